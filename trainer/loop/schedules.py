"""What changes during training: the learning rate, and which tensors are quantized onto which grid."""

from __future__ import annotations

import math

from qatapult.trainer.recipe.schema import Optimizer, Qat

#: Peak rates at 60 steps of 1,024 tokens, by bits of the weights (measured: docs/methods.md).
_RATE_BY_BITS = {8: 2e-5, 4: 1e-4, 3: 2e-4, 2: 3e-4, 1.58: 5e-4, 1: 5e-4}
_REFERENCE_STEPS = 60
_LOWEST_RATE = 1e-5


def learning_rate(optimizer: Optimizer, bits: float, steps: int) -> float:
    """Peak learning rate of the weights.

    `auto` starts from a rate for the bits and falls with the square root of the number of steps, down to the
    1e-5 that the long published runs use.
    """
    if optimizer.learning_rate != "auto":
        return optimizer.learning_rate
    rate = _RATE_BY_BITS[bits] * math.sqrt(_REFERENCE_STEPS / max(steps, _REFERENCE_STEPS))
    return max(rate, _LOWEST_RATE)


def scale_learning_rate(optimizer: Optimizer, weights_rate: float) -> float:
    """Peak rate of scales and zero points, relative to the size of a scale: ten times the weights' by default."""
    if optimizer.scale_learning_rate != "auto":
        return optimizer.scale_learning_rate
    return 10 * weights_rate


def rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Share of the peak rate at a step (from 0): linear warm-up, then the recipe's schedule down to `final`."""
    warmup = round(optimizer.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    falling = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[optimizer.schedule]
    return optimizer.final + (1 - optimizer.final) * falling


def phase_at(qat: Qat, progress: float) -> int | None:
    """Index of the progressive phase at a share of the tokens, or None without phases."""
    if not qat.schedule.phases:
        return None
    passed = 0.0
    for index, phase in enumerate(qat.schedule.phases):
        passed += phase.fraction
        if progress < passed - 1e-9:
            return index
    return len(qat.schedule.phases) - 1
