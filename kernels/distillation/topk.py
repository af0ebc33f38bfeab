"""Distillation from a cached teacher: the top k log-probabilities of each token and the mass of the rest.

Both distributions are seen as having k + 1 outcomes, the k cached tokens and "any other", so a student that puts
the right mass on the rest is not penalised for how it spreads it. With `q_j` the student's probabilities, `q_T`
the mass of its tail and `b_i = ∂D/∂log q_i` over the outcomes, the gradient by the (tempered) logits is

* `b_j − q_j Σ b` for a cached token,
* `q_j (b_T / q_T − Σ b)` for any other.
"""

from __future__ import annotations

import torch
from qatapult.kernels.distillation.objective import Objective
from qatapult.kernels.distillation.reference import divergence
from torch import Tensor


def topk_rows_(
    student: Tensor,
    top_indices: Tensor,
    top_logprobs: Tensor,
    tail_logmass: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    objective: Objective,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """As `cpu.divergence_rows_`, against cached teachers.

    Args:
        student: `[C, V]` logits; overwritten with the gradient of `Σ weight · loss` if `want_grad`.
        top_indices: `[C, k]` int64, different tokens in a row.
        top_logprobs: `[C, k]`, the teacher's log-probabilities at the objective's temperature.
        tail_logmass: `[C, 1]`, log of the mass of all other tokens.
        labels: `[C]` int64, or None.
        weight: `[C]`, the factor of each row in the sum.
        objective: what is measured.
        want_grad: whether to compute the gradient.
    """
    inverse = 1 / objective.temperature
    cross_entropy = torch.zeros_like(weight)
    hard = None
    if labels is not None:
        lse = student.logsumexp(-1, keepdim=True)
        cross_entropy = (lse - student.gather(-1, labels.unsqueeze(-1))).squeeze(-1)
        if want_grad and objective.ce_weight:
            hard = (student - lse).exp_()
            hard.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(lse))
            hard.mul_(objective.ce_weight)
    student.mul_(inverse)
    top = student.gather(-1, top_indices)
    student.scatter_(-1, top_indices, float("-inf"))
    buckets = torch.cat([top, student.logsumexp(-1, keepdim=True)], -1)
    log_z = buckets.logsumexp(-1, keepdim=True)
    log_q = buckets - log_z
    log_p = torch.cat([top_logprobs, tail_logmass], -1).to(log_q.dtype)
    kl = divergence(log_q, log_p, objective.kind, objective.beta)
    if want_grad:
        top_slope, tail_factor = bucket_slopes(log_q, log_p, objective)
        student.sub_(log_z).exp_().mul_(tail_factor)
        student.scatter_(-1, top_indices, top_slope)
        student.mul_(objective.kl_factor * inverse)
        if hard is not None:
            student.add_(hard)
        student.mul_(weight.unsqueeze(-1))
    return kl, cross_entropy


def bucket_slopes(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Derivatives by the tempered logits: `[C, k]` of the cached tokens, and `[C, 1]` the factor of the others' q.

    `over_q` below is `b / q`: derivatives by the probability, up to a constant that cancels.
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
