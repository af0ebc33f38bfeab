"""Rows of logits → losses and gradients, in place, in plain torch: for every device and dtype.

`cpu.py` and `triton_kernel.py` have the same three functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatapult.kernels.distillation.objective import Objective


def divergence_rows_(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """Divergence and cross-entropy of each row; the gradient takes the place of the student's logits.

    Args:
        student: `[C, V]` logits, contiguous; overwritten with the gradient of the sum of the rows' losses if
            `want_grad`, with anything otherwise.
        teacher: `[C, V]` logits, contiguous; may be overwritten.
        labels: `[C]` int64 tokens, or None for no cross-entropy.
        objective: what is measured.
        want_grad: whether to compute the gradient.

    Returns:
        The divergence (without T²) and the cross-entropy (0 without labels) of each row, `[C]`, fp32 (float64
        for float64 logits).
    """
    inverse = 1 / objective.temperature
    cross_entropy, hard = _cross_entropy(student, labels, objective, want_grad)
    log_q = torch.log_softmax(student.to(hard.dtype) * inverse, -1)
    log_p = torch.log_softmax(teacher.to(hard.dtype) * inverse, -1)
    kl, slope = _divergence(log_q, log_p, objective)
    if want_grad:
        student.copy_(slope.mul_(objective.kl_factor * inverse).add_(hard))
    return kl, cross_entropy


def _cross_entropy(
    student: Tensor, labels: Tensor | None, objective: Objective, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its weighted gradient; a scalar zero where there is none."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=student.device)
    if labels is None:
        return zero.expand(len(student)), zero
    log_q = torch.log_softmax(student.to(dtype), -1)
    target = labels.unsqueeze(-1)
    cross_entropy = -log_q.gather(-1, target).squeeze(-1)
    if not (want_grad and objective.ce_weight):
        return cross_entropy, zero
    hard = log_q.exp_()
    hard.scatter_add_(-1, target, hard.new_full(target.shape, -1))
    return cross_entropy, hard.mul_(objective.ce_weight)


def _divergence(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence of each row and its derivative by the tempered student logits."""
    q, p = log_q.exp(), log_p.exp()
    if objective.kind == "forward_kl":
        return _expect(p, log_p - log_q).sum(-1), q - p
    beta = objective.beta
    log_m = log_p if objective.kind == "reverse_kl" else (beta * p + (1 - beta) * q).log()
    terms = _expect(q, log_q - log_m)
    student_part = terms.sum(-1, keepdim=True)
    slope = terms - q * student_part
    if objective.kind == "reverse_kl":
        return student_part.squeeze(-1), slope
    teacher_part = _expect(p, log_p - log_m).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part.squeeze(-1), (1 - beta) * slope


def _expect(probability: Tensor, value: Tensor) -> Tensor:
    """The product; 0 where the probability is 0, whatever the value."""
    return torch.where(probability > 0, probability * value, 0)


def logsumexp_rows(logits: Tensor, inverse: float) -> Tensor:
    """`log Σ exp(logits · inverse)` of each row, `[C]` fp32 (float64 for float64)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(dtype) * inverse).logsumexp(-1)


def exponential_rows_(
    logits: Tensor, factor: Tensor, shift: Tensor, inverse: float, hard_factor: float, hard_shift: Tensor
) -> None:
    """`factor · exp(logits · inverse − shift) + hard_factor · exp(logits − hard_shift)`, in place.

    Args:
        logits: `[C, V]`.
        factor: `[C]`.
        shift: `[C]`.
        inverse: 1 / T.
        hard_factor: of the second term, at temperature 1.
        hard_shift: `[C]`.
    """
    values = logits.to(factor.dtype)
    result = factor.unsqueeze(-1) * (values * inverse - shift.unsqueeze(-1)).exp_()
    if hard_factor:
        result += hard_factor * (values - hard_shift.unsqueeze(-1)).exp_()
    logits.copy_(result)
