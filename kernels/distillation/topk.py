"""Distillation from a cached teacher: the top k log-probabilities of each token and the mass of the rest.

Both distributions are seen as having k + 1 outcomes, the k cached tokens and "any other", so a student that
puts the right mass on the rest is not penalised for how it spreads it. With `q_j` the student's
probabilities, `q_T` the mass of its tail and `b_i = ∂D/∂log q_i` over the outcomes, the gradient by the
tempered logits is

* `b_j − q_j Σ b` for a cached token,
* `q_j (b_T / q_T − Σ b)` for any other.

Rows may have fewer tokens than the widest: they are filled up with repetitions of their first token, which count for
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatapult.kernels.distillation.objective import Objective
from qatapult.kernels.distillation.reference import divergence
from qatapult.kernels.distillation.select import RowKernels


def topk_rows_(
    kernels: RowKernels,
    student: Tensor,
    top_indices: Tensor,
    teacher_buckets: Tensor,
    labels: Tensor | None,
    objective: Objective,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """As `rows.divergence_rows_`, against cached teachers.

    The cached tokens are taken out of the rows and treated apart, so that the tail's mass is a sum over the
    tail and not a difference from 1.

    Args:
        kernels: the passes over whole rows.
        student: `[C, V]` logits; overwritten.
        top_indices: `[C, k]` int64, different tokens in a row, or repetitions of the first.
        teacher_buckets: `[C, k + 1]`, log-probabilities of the cached tokens and of the tail, at the
            objective's temperature, fp32 (float64 for float64 logits).
        labels: `[C]` int64, or None.
        objective: what is measured.
        want_grad: whether to compute the gradient.
    """
    inverse = 1 / objective.temperature
    dtype = teacher_buckets.dtype
    target = None if labels is None else student.gather(-1, labels.unsqueeze(-1)).to(dtype).squeeze(-1)
    filler = top_indices == top_indices[:, :1]
    filler[:, :1] = False
    teacher_buckets = teacher_buckets.clone()
    teacher_buckets[:, :-1].masked_fill_(filler, float("-inf"))
    top = student.gather(-1, top_indices).to(dtype).masked_fill_(filler, float("-inf"))
    student.scatter_(-1, top_indices, float("-inf"))
    buckets = torch.cat([top * inverse, kernels.logsumexp_rows(student, inverse).unsqueeze(-1)], -1)
    log_z = buckets.logsumexp(-1, keepdim=True)
    log_q = buckets - log_z
    kl = divergence(log_q, teacher_buckets, objective.kind, objective.beta)
    hard_z = _hard_normaliser(kernels, student, top, log_z, inverse) if target is not None else log_z
    cross_entropy = torch.zeros_like(kl) if target is None else hard_z.squeeze(-1) - target
    if want_grad:
        top_slope, tail_factor = bucket_slopes(log_q, teacher_buckets, objective)
        factor, hard = objective.kl_factor * inverse, objective.ce_weight
        kernels.exponential_rows_(
            student, (factor * tail_factor).squeeze(-1), log_z.squeeze(-1), inverse, hard, hard_z.squeeze(-1)
        )
        top_gradient = factor * top_slope + (hard * (top - hard_z).exp() if hard else 0)
        # Fillers write what their first token does, to the same place.
        top_gradient = torch.where(filler, top_gradient[:, :1], top_gradient)
        student.scatter_(-1, top_indices, top_gradient.to(student.dtype))
        if hard and labels is not None:
            student.scatter_add_(-1, labels.unsqueeze(-1), torch.full_like(student[:, :1], -hard))
    return kl, cross_entropy


def _hard_normaliser(kernels: RowKernels, tail: Tensor, top: Tensor, log_z: Tensor, inverse: float) -> Tensor:
    """`[C, 1]`: log Σ exp(logits) at temperature 1, of rows whose cached tokens were taken out."""
    if inverse == 1:
        return log_z
    return torch.cat([top, kernels.logsumexp_rows(tail, 1.0).unsqueeze(-1)], -1).logsumexp(-1, keepdim=True)


def bucket_slopes(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Derivatives by the tempered logits: `[C, k]` of the cached tokens, `[C, 1]` what the tail's q are
    multiplied with.

    `over_q` below is `b / q`, up to a constant that cancels.
    """
    if objective.kind == "forward_kl":
        over_q, by_log = -(log_p - log_q).exp(), -log_p.exp()
    else:
        beta = objective.beta
        mixture = log_p
        if objective.kind == "jsd":
            mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        over_q = (log_q - mixture) * (1.0 if objective.kind == "reverse_kl" else 1 - beta)
        by_log = torch.where(log_q.isneginf(), 0, log_q.exp() * over_q)
    total = by_log.sum(-1, keepdim=True)
    slope = by_log - log_q.exp() * total
    tail = torch.where(log_q[:, -1:].isneginf(), 0, over_q[:, -1:] - total)
    return slope[:, :-1], tail
