"""The public functions: checks, options, autocast, sharded heads, reduction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qatapult.kernels.distillation import op
from qatapult.kernels.distillation.objective import Kind, Objective

Reduction = Literal["mean", "sum"]


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
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Any:
    """Distillation loss of a student and a teacher, from hidden states, without whole logits.

    The loss of one token is `(1 − ce_weight) · T² · D + ce_weight · CE`, with `D` the divergence between
    `softmax(teacher_hidden · teacher_headᵀ / T)` and the student's (formulas and sources:
    `reference.divergence`), and `CE` the cross-entropy of the student with the label, at temperature 1.
    Gradients, of `student_hidden` and `student_head` where they require one, are computed with the loss,
    chunk by chunk, and kept until the backward pass; the teacher is a constant. Logits of `chunk_tokens`
    tokens are held at a time. Deterministic.

    Products run in the tensors' dtype: under autocast in its dtype; on a CPU without bf16 instructions in
    fp32. Softmax, divergence and sums are fp32. A head that is a DTensor is gathered whole for the call, and
    its gradient averaged over the mesh, as FSDP2 averages; a ZeRO-3 partition must be gathered by the caller.

    Args:
        student_hidden: `[..., D]` last hidden states (after the final norm), fp32, bf16, fp16 or fp64.
        student_head: `[V, D]` weight of the output head.
        teacher_hidden: `[..., D_teacher]`, the same leading shape.
        teacher_head: `[V, D_teacher]`, over the same vocabulary.
        kind: `forward_kl`, `reverse_kl` or `jsd`.
        temperature: T.
        beta: the teacher's share of the mixture, for `jsd`.
        labels: `[...]` int64; `labels[t]` is the target of hidden state `t` (shift them before).
        ignore_index: tokens with this label do not count.
        ce_weight: share of the cross-entropy.
        mask: `[...]`; tokens where it is False or 0 do not count.
        chunk_tokens: by default what fits 88 MiB on a CPU and 1.25 GiB on a GPU.
        reduction: `mean` over the tokens that count, or `sum`. No such token: 0, with zero gradients.
        return_parts: also return the terms, detached.

    Returns:
        The scalar loss in fp32 (float64 for float64 inputs); or, with `return_parts`, the loss and a
        dictionary: `kl` (with its factor T²) and, where labels are given, `ce`, under the same reduction, and
        `tokens`, how many count. Sum and count are what ranks exchange to average over all their tokens.

    Raises:
        ValueError: for shapes or options that do not go together, and labels outside the vocabulary.
    """
    objective = Objective(kind, temperature, beta, ce_weight)
    tokens = _check(student_hidden, student_head, "student")
    _check(teacher_hidden, teacher_head, "teacher")
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student_head has a vocabulary of {student_head.shape[0]}, teacher_head of "
            f"{teacher_head.shape[0]}; they must share one"
        )
    _check_tokens("teacher_hidden", teacher_hidden.shape[:-1], tokens)
    valid = _valid(tokens, labels, ignore_index, mask, objective, reduction)
    results = op.distillation_sums(
        *_operands(student_hidden, student_head),
        *(operand.detach() for operand in _operands(teacher_hidden, teacher_head)),
        *_options(labels, valid, objective, chunk_tokens, student_hidden, student_head),
    )
    return _reduce(results, tokens, labels, valid, reduction, return_parts)


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
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Any:
    """Distillation loss against a cached teacher; what is not said here is as in `distillation_loss`.

    Teacher and student are compared over k + 1 outcomes: the k cached tokens, and all others together, so the
    loss is at most that of the whole distributions, and equal to it where k is the vocabulary.

    Args:
        student_hidden: `[..., D]`.
        student_head: `[V, D]`.
        top_indices: `[..., k]` integers, different tokens of the vocabulary, in any order. A row with fewer than
            k is filled up by repeating its first token; fillers count for nothing, whatever their log-probability.
        top_logprobs: `[..., k]`, the teacher's log-probabilities of them **at this temperature**.
        tail_mass: `[...]`, the teacher's probability of all other tokens. By default what `top_logprobs`
            leave of 1, which is inexact where they were stored in 16 bits.
        kind: see `distillation_loss`, as for all that follow. `reverse_kl` is infinite where `tail_mass` is
            0.
        temperature: T.
        beta: the teacher's share of the mixture, for `jsd`.
        labels: `[...]` int64.
        ignore_index: tokens with this label do not count.
        ce_weight: share of the cross-entropy.
        mask: `[...]`.
        chunk_tokens: tokens whose logits are held.
        reduction: `mean` or `sum`.
        return_parts: also return the terms.

    Returns:
        As `distillation_loss`.

    Raises:
        ValueError: for shapes or options that do not go together, and tokens outside the vocabulary.
    """
    objective = Objective(kind, temperature, beta, ce_weight)
    tokens = _check(student_hidden, student_head, "student")
    k = top_indices.shape[-1]
    _check_tokens("top_indices", top_indices.shape[:-1], tokens)
    _check_tokens("top_logprobs", top_logprobs.shape, (*tokens, k))
    precise = torch.promote_types(top_logprobs.dtype, torch.float32)
    logprobs = top_logprobs.detach().to(precise)
    if tail_mass is None:
        # A cache of the whole vocabulary has no tail, not even one of rounding errors.
        filler = (top_indices == top_indices[..., :1]).index_fill(-1, top_indices.new_zeros(1).long(), False)
        rest = (1 - logprobs.exp().masked_fill(filler, 0).sum(-1)).clamp(min=0)
        tail_mass = rest if k < student_head.shape[0] else torch.zeros_like(rest)
    _check_tokens("tail_mass", tail_mass.shape, tokens)
    buckets = torch.cat([logprobs, tail_mass.detach().to(precise).log().unsqueeze(-1)], -1)
    valid = _valid(tokens, labels, ignore_index, mask, objective, reduction)
    results = op.topk_distillation_sums(
        *_operands(student_hidden, student_head),
        top_indices.long().reshape(-1, k),
        buckets.reshape(-1, k + 1),
        *_options(labels, valid, objective, chunk_tokens, student_hidden, student_head),
    )
    return _reduce(results, tokens, labels, valid, reduction, return_parts)


def _check(hidden: Tensor, head: Tensor, whose: str) -> torch.Size:
    """The shape of the tokens."""
    if head.dim() != 2 or head.numel() == 0:
        raise ValueError(
            f"{whose}_head has shape {list(head.shape)}; it must be [vocabulary, hidden size]. An empty "
            "weight is a ZeRO-3 partition: gather it with deepspeed.zero.GatheredParameters around the loss"
        )
    if hidden.dim() < 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{whose}_hidden {list(hidden.shape)} does not go with {whose}_head {list(head.shape)}: "
            "the last dimensions must agree"
        )
    return hidden.shape[:-1]


def _check_tokens(name: str, shape: torch.Size, wanted: torch.Size | tuple[int, ...]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name} covers {list(shape)}, student_hidden {list(wanted)}; they must agree")


def _valid(
    tokens: torch.Size,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    objective: Objective,
    reduction: str,
) -> Tensor | None:
    """`[T]` bool: the tokens that count; None for all."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum")
    if labels is None and objective.ce_weight:
        raise ValueError(f"ce_weight={objective.ce_weight} needs labels")
    valid = None
    if labels is not None:
        _check_tokens("labels", labels.shape, tokens)
        valid = labels.reshape(-1) != ignore_index
    if mask is not None:
        _check_tokens("mask", mask.shape, tokens)
        chosen = mask.reshape(-1).bool()
        valid = chosen if valid is None else valid & chosen
    return valid


def _operands(hidden: Tensor, head: Any) -> tuple[Tensor, Tensor]:
    """Hidden states as `[T, D]` and the whole head, in the dtype that autocast asks for."""
    if hasattr(head, "full_tensor"):
        from torch.distributed.tensor import Partial

        head = head.full_tensor(grad_placements=[Partial("avg")] * head.device_mesh.ndim)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and (device != "cpu" or torch.cpu._is_avx512_bf16_supported()):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]), head


def _options(
    labels: Tensor | None,
    valid: Tensor | None,
    objective: Objective,
    chunk_tokens: int | None,
    student_hidden: Tensor,
    student_head: Tensor,
) -> tuple[Any, ...]:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    enabled = torch.is_grad_enabled()
    return (
        None if labels is None else labels.reshape(-1).long(),
        valid,
        *(objective.kind, objective.temperature, objective.beta, objective.ce_weight),
        chunk_tokens or 0,
        enabled and student_hidden.requires_grad,
        enabled and student_head.requires_grad,
    )


def _reduce(
    results: tuple[Tensor, ...],
    tokens: torch.Size,
    labels: Tensor | None,
    valid: Tensor | None,
    reduction: Reduction,
    return_parts: bool,
) -> Any:
    loss, kl, cross_entropy = results[:3]
    count = torch.tensor(tokens.numel(), device=loss.device) if valid is None else valid.sum()
    if reduction == "mean":
        loss, kl, cross_entropy = (total / count.clamp(min=1) for total in (loss, kl, cross_entropy))
    if not return_parts:
        return loss
    parts = {"kl": kl.detach(), "tokens": count}
    if labels is not None:
        parts["ce"] = cross_entropy.detach()
    return loss, parts
