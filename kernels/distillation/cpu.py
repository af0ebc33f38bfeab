"""Rows of logits → divergence, cross-entropy and gradient, in place, with plain torch on any device."""

from __future__ import annotations

import torch
from qatapult.kernels.distillation.objective import Objective
from torch import Tensor


def divergence_rows_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    objective: Objective,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Divergence and cross-entropy of each row; the gradient takes the place of the student's logits.

    Args:
        student: `[C, V]` logits; overwritten with the gradient of `Σ weight · loss` if `want_grad`.
        teacher: `[C, V]` logits; may be overwritten.
        labels: `[C]` int64 tokens, or None for no cross-entropy.
        weight: `[C]` fp32, the factor of each row in the sum.
        objective: what is measured.
        want_grad: whether to compute the gradient.

    Returns:
        The divergence and the cross-entropy of each row, `[C]` fp32, not weighted.
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
    log_q = student.mul_(inverse).sub_(student.logsumexp(-1, keepdim=True))
    log_p = teacher.mul_(inverse).sub_(teacher.logsumexp(-1, keepdim=True))
    kl, slope = _divergence(log_q, log_p, objective)
    if want_grad:
        student.copy_(slope).mul_(objective.kl_factor * inverse)
        if hard is not None:
            student.add_(hard)
        student.mul_(weight.unsqueeze(-1))
    return kl, cross_entropy


def _divergence(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence of each row and its derivative by the (tempered) student logits."""
    q, p = log_q.exp(), log_p.exp()
    if objective.kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1), q - p
    beta = objective.beta
    log_m = log_p if objective.kind == "reverse_kl" else (beta * p + (1 - beta) * q).log()
    terms = q * (log_q - log_m)
    student_part = terms.sum(-1, keepdim=True)
    slope = terms - q * student_part
    if objective.kind == "reverse_kl":
        return student_part.squeeze(-1), slope
    teacher_part = (p * (log_p - log_m)).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part.squeeze(-1), (1 - beta) * slope
