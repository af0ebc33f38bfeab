"""The registered operators and the public functions in front of them."""

from __future__ import annotations

from typing import Any

import torch
from qatapult.kernels.distillation import chunks, cpu, topk
from qatapult.kernels.distillation.objective import Kind, Objective
from torch import Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Any:
    """Distillation loss of a student and a teacher, from hidden states, without whole logits.

    The loss of one token is `(1 − ce_weight) · T² · D + ce_weight · CE`, with `D` the divergence between
    `softmax(teacher_hidden · teacher_headᵀ / T)` and the student's (`reference.divergence` has the formulas), and CE
    the cross-entropy of the student with the label. Gradients, of `student_hidden` and `student_head` where they
    require one, are computed with the loss, chunk by chunk; the teacher is a constant.

    Args:
        student_hidden: `[..., D]` last hidden states (after the final norm).
        student_head: `[V, D]` weight of the output head.
        teacher_hidden: `[..., D_teacher]`, the same leading shape.
        teacher_head: `[V, D_teacher]`, over the same vocabulary.
        kind: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: T.
        beta: the teacher's share of the mixture, for `jsd`.
        labels: `[...]` int64; `labels[t]` is the target of hidden state `t` (shift them before).
        ignore_index: tokens with this label do not count.
        ce_weight: share of the cross-entropy.
        mask: `[...]` bool; tokens where it is False do not count.
        chunk_tokens: tokens whose logits are held at a time; by default what fits a fixed memory budget.
        reduction: `mean` over the valid tokens, or `sum`. No valid token: 0, with zero gradients.
        return_parts: also return `{"kl", "ce", "tokens"}`, detached: the terms under the same reduction (`kl` with
            its factor T², `ce` where labels are given) and the number of valid tokens. Sum and count are what
            ranks exchange to average over all their tokens.

    Returns:
        The scalar loss in fp32 (float64 for float64 inputs), or the loss and its parts.

    Raises:
        ValueError: for shapes or options that do not go together.
    """
    objective = Objective(kind, temperature, beta, ce_weight)
    _check(student_hidden, student_head, "student")
    _check(teacher_hidden, teacher_head, "teacher")
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student_head has {student_head.shape[0]} tokens in its vocabulary, teacher_head "
            f"{teacher_head.shape[0]}; they must share one vocabulary"
        )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {list(student_hidden.shape)} and teacher_hidden {list(teacher_hidden.shape)} "
            "must agree in all but the last dimension"
        )
    weight = _weights(student_hidden, labels, ignore_index, mask, objective, reduction)
    teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    results = torch.ops.qatapult.distillation_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        teacher_hidden,
        teacher_head.detach(),
        None if labels is None else labels.reshape(-1),
        weight,
        objective.kind,
        objective.temperature,
        objective.beta,
        objective.ce_weight,
        chunk_tokens or 0,
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and student_head.requires_grad,
    )
    return _result(results, weight, labels is not None, return_parts)


def topk_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_indices: Tensor,
    top_logprobs: Tensor,
    tail_mass: Tensor | None = None,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Any:
    """Distillation loss against a cached teacher; otherwise as `distillation_loss`.

    Teacher and student are compared over k + 1 outcomes: the k cached tokens, and all others together.

    Args:
        student_hidden: `[..., D]`.
        student_head: `[V, D]`.
        top_indices: `[..., k]` int64, different tokens of the vocabulary, in any order.
        top_logprobs: `[..., k]`, the teacher's log-probabilities of them **at this temperature**.
        tail_mass: `[...]`, the teacher's probability of all other tokens. By default what `top_logprobs` leave of 1
            (inexact where they were stored in 16 bits).
        kind: see `distillation_loss`, as all the following. `reverse_kl` is infinite where `tail_mass` is 0.
        temperature: see `distillation_loss`.
        beta: see `distillation_loss`.
        labels: see `distillation_loss`.
        ignore_index: see `distillation_loss`.
        ce_weight: see `distillation_loss`.
        mask: see `distillation_loss`.
        chunk_tokens: see `distillation_loss`.
        reduction: see `distillation_loss`.
        return_parts: see `distillation_loss`.

    Returns:
        As `distillation_loss`.

    Raises:
        ValueError: for shapes or options that do not go together.
    """
    objective = Objective(kind, temperature, beta, ce_weight)
    _check(student_hidden, student_head, "student")
    tokens = student_hidden.shape[:-1]
    for name, given in (("top_indices", top_indices), ("top_logprobs", top_logprobs)):
        if given.shape[:-1] != tokens or given.shape != top_indices.shape:
            raise ValueError(f"{name} {list(given.shape)} must be {[*tokens, 'k']}")
    if tail_mass is None:
        tail_mass = (1 - top_logprobs.float().exp().sum(-1)).clamp(min=0)
    if tail_mass.shape != tokens:
        raise ValueError(
            f"tail_mass {list(tail_mass.shape)} must have the shape {list(tokens)} of the tokens"
        )
    weight = _weights(student_hidden, labels, ignore_index, mask, objective, reduction)
    k = top_indices.shape[-1]
    results = torch.ops.qatapult.topk_distillation_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        top_indices.reshape(-1, k),
        top_logprobs.detach().reshape(-1, k),
        tail_mass.detach().reshape(-1, 1).log(),
        None if labels is None else labels.reshape(-1),
        weight,
        objective.kind,
        objective.temperature,
        objective.beta,
        objective.ce_weight,
        chunk_tokens or 0,
        torch.is_grad_enabled() and student_hidden.requires_grad,
        torch.is_grad_enabled() and student_head.requires_grad,
    )
    return _result(results, weight, labels is not None, return_parts)


def _result(results: tuple[Tensor, ...], weight: Tensor, labelled: bool, return_parts: bool) -> Any:
    loss, kl, cross_entropy = results[:3]
    if not return_parts:
        return loss
    parts = {"kl": kl.detach(), "tokens": (weight != 0).sum()}
    if labelled:
        parts["ce"] = cross_entropy.detach()
    return loss, parts


def _check(hidden: Tensor, head: Tensor, whose: str) -> None:
    if head.dim() != 2 or head.numel() == 0:
        raise ValueError(
            f"{whose}_head has shape {list(head.shape)}; it must be [vocabulary, hidden size]. An empty weight is a "
            "ZeRO-3 partition: gather it (deepspeed.zero.GatheredParameters) around the loss"
        )
    if hidden.dim() < 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{whose}_hidden {list(hidden.shape)} does not go with {whose}_head {list(head.shape)}: "
            "the last dimensions must agree"
        )


def _weights(
    hidden: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    objective: Objective,
    reduction: str,
) -> Tensor:
    """`[T]`: the factor of each token in the loss, 0 for those that do not count."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum")
    if objective.ce_weight and labels is None:
        raise ValueError(f"ce_weight={objective.ce_weight} needs labels")
    valid = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    for name, given in (("labels", labels), ("mask", mask)):
        if given is None:
            continue
        if given.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} {list(given.shape)} must have the shape {list(hidden.shape[:-1])} of the tokens"
            )
        valid = valid & (given != ignore_index if name == "labels" else given.bool())
    weight = valid.reshape(-1).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return weight / weight.sum().clamp(min=1) if reduction == "mean" else weight


@torch.library.custom_op("qatapult::distillation_loss", mutates_args=())
def _distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    ce_weight: float,
    chunk_tokens: int,
    want_hidden: bool,
    want_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two terms, gradient of the hidden states, gradient of the head (empty where not wanted)."""
    objective = Objective(kind, temperature, beta, ce_weight)  # type: ignore[arg-type]
    targets = None if labels is None else labels.clamp(min=0)
    problem = chunks.Problem(student_hidden, student_head, targets, weight, objective, want_hidden, want_head)
    dtype = chunks.product_dtype(teacher_head)
    frozen = teacher_head.to(dtype)

    def row_loss(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        teacher = teacher_hidden[part].to(dtype) @ frozen.t()
        chunk_labels = None if targets is None else targets[part]
        return cpu.divergence_rows_(logits, teacher, chunk_labels, weight[part], objective, problem.want_grad)

    tokens, vocabulary = len(student_hidden), len(student_head)
    size = chunk_tokens or chunks.chunk_size(tokens, vocabulary, dtype.itemsize, student_head.device)
    return _finish(problem, chunks.run(problem, row_loss, size))


@torch.library.custom_op("qatapult::topk_distillation_loss", mutates_args=())
def _topk_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_indices: Tensor,
    top_logprobs: Tensor,
    tail_logmass: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    ce_weight: float,
    chunk_tokens: int,
    want_hidden: bool,
    want_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_distillation_loss`."""
    objective = Objective(kind, temperature, beta, ce_weight)  # type: ignore[arg-type]
    targets = None if labels is None else labels.clamp(min=0)
    problem = chunks.Problem(student_hidden, student_head, targets, weight, objective, want_hidden, want_head)

    def row_loss(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        cached = (top_indices[part], top_logprobs[part], tail_logmass[part])
        chunk_labels = None if targets is None else targets[part]
        return topk.topk_rows_(logits, *cached, chunk_labels, weight[part], objective, problem.want_grad)

    tokens, vocabulary = len(student_hidden), len(student_head)
    itemsize = chunks.product_dtype(student_head).itemsize
    size = chunk_tokens or chunks.chunk_size(tokens, vocabulary, itemsize, student_head.device)
    return _finish(problem, chunks.run(problem, row_loss, size))


def _finish(problem: chunks.Problem, totals: chunks.Totals) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    objective, weight = problem.objective, problem.weight
    scale = weight.max() if weight.numel() else weight.new_zeros(())
    kl = totals.kl * scale * objective.temperature**2
    ce = totals.cross_entropy * scale
    loss = (1 - objective.ce_weight) * kl + objective.ce_weight * ce
    hidden, head = (
        problem.hidden.new_empty(0) if grad is None else grad
        for grad in (totals.grad_hidden, totals.grad_head)
    )
    return loss, kl, ce, hidden, head


def _fake(student_hidden: Tensor, student_head: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight = next(value for value in rest if isinstance(value, torch.Tensor) and value.dim() == 1)
    want_hidden, want_head = rest[-2:]
    return (
        weight.new_empty(()),
        weight.new_empty(()),
        weight.new_empty(()),
        torch.empty_like(student_hidden) if want_hidden else student_hidden.new_empty(0),
        torch.empty_like(student_head) if want_head else student_hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = [
        saved * grad.to(saved.dtype) if want and grad is not None else None
        for want, saved in zip(ctx.wants, ctx.saved_tensors, strict=True)
    ]
    return (*gradients, *(None for _ in range(ctx.inputs - 2)))


for _operator in (_distillation_loss, _topk_distillation_loss):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup_context)
