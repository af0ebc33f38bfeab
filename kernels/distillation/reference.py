"""The losses as formulas, in plain torch with whole [tokens, vocabulary] tensors: what tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qatapult.kernels.distillation.objective import Kind, Objective


def divergence(student_logprobs: Tensor, teacher_logprobs: Tensor, kind: Kind, beta: float) -> Tensor:
    """Divergence of each row. With p the teacher's and q the student's probabilities:

    * `forward_kl`: KL(p ‖ q) = Σ p (log p − log q)
    * `reverse_kl`: KL(q ‖ p)
    * `jsd`: β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, the generalized Jensen-Shannon
      divergence of GKD (Agarwal et al., arXiv:2306.13649, equation 1)

    Args:
        student_logprobs: `[..., V]`, log q.
        teacher_logprobs: `[..., V]`, log p.
        kind: which divergence.
        beta: for `jsd`.

    Returns:
        `[...]`.
    """
    if kind == "forward_kl":
        return _kl(teacher_logprobs, student_logprobs)
    if kind == "reverse_kl":
        return _kl(student_logprobs, teacher_logprobs)
    mixture = (beta * teacher_logprobs.exp() + (1 - beta) * student_logprobs.exp()).log()
    return beta * _kl(teacher_logprobs, mixture) + (1 - beta) * _kl(student_logprobs, mixture)


def _kl(logprobs: Tensor, other: Tensor) -> Tensor:
    """KL(p ‖ other) of each row; terms with p = 0 count as 0."""
    probs = logprobs.exp()
    return torch.where(probs > 0, probs * (logprobs - other), torch.zeros_like(probs)).sum(-1)


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    objective: Objective,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    mean: bool = True,
) -> Tensor:
    """The loss of `qatapult.kernels.distillation_loss`, differentiable by autograd."""
    student = student_hidden @ student_head.t()
    teacher = (teacher_hidden @ teacher_head.t()).detach()
    temperature = objective.temperature
    token_kl = divergence(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        objective.kind,
        objective.beta,
    )
    return combine(token_kl, student, objective, labels, valid, mean)


def topk_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_indices: Tensor,
    top_logprobs: Tensor,
    tail_mass: Tensor,
    objective: Objective,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    mean: bool = True,
) -> Tensor:
    """The loss of `qatapult.kernels.topk_distillation_loss`, differentiable by autograd.

    Both distributions have k + 1 outcomes: the k cached tokens, and all others together.
    """
    student = student_hidden @ student_head.t()
    logprobs = F.log_softmax(student / objective.temperature, -1)
    tail = logprobs.scatter(-1, top_indices, float("-inf")).logsumexp(-1, keepdim=True)
    student_buckets = torch.cat([logprobs.gather(-1, top_indices), tail], -1)
    teacher_buckets = torch.cat([top_logprobs, tail_mass.log().unsqueeze(-1)], -1)
    token_kl = divergence(student_buckets, teacher_buckets, objective.kind, objective.beta)
    return combine(token_kl, student, objective, labels, valid, mean)


def combine(
    token_kl: Tensor,
    student_logits: Tensor,
    objective: Objective,
    labels: Tensor | None,
    valid: Tensor | None,
    mean: bool,
) -> Tensor:
    """Mix with the cross-entropy and reduce over the valid tokens; no valid token gives 0."""
    token_loss = objective.kl_factor * token_kl
    if labels is not None:
        safe = labels.clamp(min=0)
        cross_entropy = F.cross_entropy(student_logits, safe, reduction="none")
        token_loss = token_loss + objective.ce_weight * cross_entropy
    if valid is not None:
        token_loss = token_loss[valid]
    return token_loss.sum() / max(len(token_loss), 1) if mean else token_loss.sum()
