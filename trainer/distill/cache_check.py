"""How well a cache stands for its teacher: the loss and the gradient that training gets from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.distill.cache import CachedTeacher, stored_bits_per_token
from qatapult.trainer.distill.student import LossParts, Student, TeacherSignal
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.quantize.ptq.calibration import spread_blocks


@dataclass(frozen=True)
class CacheCheck:
    """What `check_cache` found.

    Attributes:
        bits_per_token: on disk.
        kept_mass: mean probability of the kept tokens.
        kept_tokens: mean number of kept tokens a position.
        full_loss: mean divergence from the whole teacher, nats a token.
        cached_loss: mean divergence from the cache.
        gradient_cosine: between the gradients of both losses, over all parameters that train.
        tokens: that were looked at.
    """

    bits_per_token: float
    kept_mass: float
    kept_tokens: float
    full_loss: float
    cached_loss: float
    gradient_cosine: float
    tokens: int


def check_cache(
    folder: Path,
    cached: CachedTeacher,
    teacher: PreTrainedModel,
    student: Student,
    blocks: Blocks,
    count: int,
    batch_size: int = 1,
) -> CacheCheck:
    """Compare training from a cache with training from the whole teacher, for a student as it is now.

    Args:
        folder: the cache.
        cached: reads it.
        teacher: the model that it was written by, on the student's device.
        student: the model that would train; parameters with `requires_grad` are compared.
        blocks: training blocks that the cache belongs to.
        count: how many of them, spread evenly over the text.
        batch_size: blocks at a time.
    """
    numbers = spread_blocks(torch.arange(len(blocks)).unsqueeze(1), count).flatten()
    whole = InProcessTeacher(teacher)
    device = next(student.parameters()).device
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    totals, masses, kept = torch.zeros(2, dtype=torch.float64), [], []
    gradients = [[torch.zeros_like(parameter) for parameter in trained] for _ in range(2)]
    for part in numbers.split(batch_size):
        ids = blocks[part].to(device)
        signals = (whole.signal(ids, part), cached.signal(ids, part))
        for which, signal in enumerate(signals):
            totals[which] += _add_gradient(student, ids, signal, trained, gradients[which])
        assert signals[1].tail_mass is not None
        masses.append(1 - signals[1].tail_mass.mean().item())
        kept += [cached.kept_tokens(int(number)) for number in part]
    tokens = len(numbers) * blocks.shape[1]
    full, stored = (totals / tokens).tolist()
    return CacheCheck(
        stored_bits_per_token(folder),
        sum(masses) / len(masses),
        sum(kept) / len(kept),
        full,
        stored,
        _cosine(*gradients),
        tokens,
    )


def _add_gradient(
    student: Student, ids: Tensor, signal: TeacherSignal, trained: Sequence[Tensor], into: list[Tensor]
) -> float:
    parts = student(ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device), signal)
    assert isinstance(parts, LossParts)
    for sums, gradient in zip(into, torch.autograd.grad(parts.loss, trained, allow_unused=True), strict=True):
        if gradient is not None:
            sums += gradient
    return float(parts.kl)


def _cosine(one: list[Tensor], other: list[Tensor]) -> float:
    def product(left: list[Tensor], right: list[Tensor]) -> float:
        return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))

    return product(one, other) / max((product(one, one) * product(other, other)) ** 0.5, 1e-300)
