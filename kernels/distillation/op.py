"""The registered operators: sums over tokens, with the gradients of those sums as further outputs.

Both take the options of an `Objective`, the size of a chunk and which gradients are wanted, and return

    loss, kl, cross_entropy, grad_hidden, grad_head

where only `loss` is differentiable, `kl` carries its factor T², and a gradient that is not wanted is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatapult.kernels.distillation import chunks
from qatapult.kernels.distillation.objective import Kind, Objective
from qatapult.kernels.distillation.select import row_kernels
from qatapult.kernels.distillation.topk import topk_rows_

_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("qatapult::distillation_loss", mutates_args=())
def distillation_sums(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    ce_weight: float,
    chunk_tokens: int,
    want_hidden: bool,
    want_head: bool,
) -> _Results:
    """Student `[T, D]`, `[V, D]`, teacher `[T, E]`, `[V, E]`; `labels` `[T]` int64, `valid` `[T]` bool."""
    objective = Objective(_kind(kind), temperature, beta, ce_weight)
    counted = Counted(valid)
    student = chunks.Student(counted.take(student_hidden), student_head, want_hidden, want_head)
    labels = _in_vocabulary("labels", counted.take(labels), student_head)
    size = chunk_tokens or chunks.chunk_size(len(student.hidden), student_head)
    teacher = chunks.Logits(counted.take(teacher_hidden), teacher_head, size)

    def row_loss(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        targets = None if labels is None else labels[part]
        kernels = row_kernels(logits)
        return kernels.divergence_rows_(logits, teacher.of(part), targets, objective, student.want_grad)

    return _results(student_hidden, counted, objective, chunks.run(student, row_loss, size))


@torch.library.custom_op("qatapult::topk_distillation_loss", mutates_args=())
def topk_distillation_sums(
    student_hidden: Tensor,
    student_head: Tensor,
    top_indices: Tensor,
    teacher_buckets: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    ce_weight: float,
    chunk_tokens: int,
    want_hidden: bool,
    want_head: bool,
) -> _Results:
    """Student `[T, D]`, `[V, D]`; tokens `[T, k]` and log-probabilities `[T, k + 1]` of a cache."""
    objective = Objective(_kind(kind), temperature, beta, ce_weight)
    counted = Counted(valid)
    student = chunks.Student(counted.take(student_hidden), student_head, want_hidden, want_head)
    labels = _in_vocabulary("labels", counted.take(labels), student_head)
    indices = _in_vocabulary("top_indices", counted.take(top_indices), student_head)
    buckets = counted.take(teacher_buckets)
    size = chunk_tokens or chunks.chunk_size(len(student.hidden), student_head)

    def row_loss(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        targets = None if labels is None else labels[part]
        cached = (indices[part], buckets[part].to(torch.promote_types(logits.dtype, torch.float32)))
        return topk_rows_(row_kernels(logits), logits, *cached, targets, objective, student.want_grad)

    return _results(student_hidden, counted, objective, chunks.run(student, row_loss, size))


class Counted:
    """The tokens that count: the others take no part in any product."""

    def __init__(self, valid: Tensor | None) -> None:
        self._rows = None
        if valid is not None:
            rows = valid.nonzero().squeeze(-1)
            self._rows = rows if len(rows) < len(valid) else None

    def take(self, tensor: Any) -> Any:
        """Their rows of a tensor (of None: None)."""
        return tensor if self._rows is None or tensor is None else tensor.index_select(0, self._rows)

    def put(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The reverse: rows of the tokens that do not count are zero."""
        return tensor if self._rows is None else torch.zeros_like(like).index_copy_(0, self._rows, tensor)


def _kind(kind: str) -> Kind:
    return kind  # type: ignore[return-value]  # an operator's schema knows only str; Objective checks it


def _in_vocabulary(name: str, tokens: Any, head: Tensor) -> Any:
    if tokens is not None and tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= len(head):
            raise ValueError(f"{name} has token {low if low < 0 else high}, outside 0 … {len(head) - 1}")
    return tokens


def _results(student_hidden: Tensor, counted: Counted, objective: Objective, sums: chunks.Sums) -> _Results:
    kl, cross_entropy = sums.kl * objective.temperature**2, sums.cross_entropy
    loss = (1 - objective.ce_weight) * kl + objective.ce_weight * cross_entropy
    grad_hidden = student_hidden.new_empty(0)
    if sums.grad_hidden is not None:
        grad_hidden = counted.put(sums.grad_hidden, student_hidden)
    grad_head = student_hidden.new_empty(0) if sums.grad_head is None else sums.grad_head
    return loss, kl, cross_entropy, grad_hidden, grad_head


def _fake(student_hidden: Tensor, student_head: Tensor, *rest: Any) -> _Results:
    want_hidden, want_head = rest[-2:]
    dtype = torch.promote_types(chunks.product_dtype(student_hidden, student_head), torch.float32)
    loss, kl, cross_entropy = (student_hidden.new_empty((), dtype=dtype) for _ in range(3))
    grad_hidden = torch.empty_like(student_hidden) if want_hidden else student_hidden.new_empty(0)
    grad_head = torch.empty_like(student_head) if want_head else student_hidden.new_empty(0)
    return loss, kl, cross_entropy, grad_hidden, grad_head


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = [
        saved * grad.to(saved.dtype) if want and grad is not None else None
        for want, saved in zip(ctx.wants, ctx.saved_tensors, strict=True)
    ]
    return (*gradients, *(None for _ in range(ctx.arguments - 2)))


for _operator in (distillation_sums, topk_distillation_sums):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup_context)
