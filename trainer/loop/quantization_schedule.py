"""Delayed and progressive quantization: which grids are in force at a share of the run."""

from __future__ import annotations

import torch
from torch import nn

from qatapult.kernels import choose_range
from qatapult.trainer.loop.schedules import phase_at
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.schema import Qat


def apply_schedule(model: nn.Module, qat: Qat, progress: float, current_phase: int | None) -> int | None:
    """Switch quantization on or to the next phase's grid where the schedule says so.

    Args:
        model: prepared; unquantized models are left as they are.
        qat: holds the schedule.
        progress: share of the run's tokens, from 0 to 1.
        current_phase: index of the phase that the scales belong to.

    Returns:
        Index of the phase now in force, or None without phases.
    """
    schedule = qat.schedule
    phase = phase_at(qat, progress)
    for layer in quant_layers(model).values():
        layer.quantize_weights = progress >= schedule.weights_start
        layer.quantize_activations = progress >= schedule.activations_start
        if phase is not None:
            _enter_phase(layer, qat, phase, rescale=phase != current_phase)
    return phase


def on_deployed_grid(qat: Qat, progress: float) -> bool:
    """Whether everything is quantized as it will be served: before that, no perplexity counts as the best."""
    schedule = qat.schedule
    phase = phase_at(qat, progress)
    return progress >= max(schedule.weights_start, schedule.activations_start) and phase in (
        None,
        len(schedule.phases) - 1,
    )


@torch.no_grad()
def _enter_phase(layer: QuantizedWeight, qat: Qat, phase: int, rescale: bool) -> None:
    """Lay a layer on a phase's grid; scales are chosen anew from its weights when the phase begins."""
    if layer.weight_scheme is None:
        return
    layer.weight_scheme = qat.schedule.phases[phase].weights.scheme
    if rescale and layer.weight_scale is not None:
        scale, zero_point = choose_range(layer.weight_matrix(), layer.weight_scheme)
        layer.weight_scale.copy_(scale)
        if zero_point is not None and layer.weight_zero_point is not None:
            layer.weight_zero_point.copy_(zero_point)
