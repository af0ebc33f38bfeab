"""Fake-quantization for use inside other operators: the same results without the dispatch of registered operators,
which at the sizes of a small model's layers takes as long as the work. No gradients.
"""

from __future__ import annotations

import torch

from qatapult.kernels.fake_quant import cpu, dynamic, op
from qatapult.kernels.fake_quant.spec import Gradient, Grid, RangeRule
from qatapult.kernels.scheme import Scheme


def values_in(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of `fake_quantize` in any dtype; in one pass where the backend can."""
    implementation = op.implementation(x)
    if implementation is cpu:
        return cpu.forward(x, scale, zero_point, Grid.of(scheme), dtype)
    values: torch.Tensor = implementation.forward(x, scale, zero_point, Grid.of(scheme))
    return values.to(dtype)


def codes_of(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """The codes of `quantize`."""
    codes: torch.Tensor = op.implementation(x).quantize(x, scale, zero_point, Grid.of(scheme))
    return codes


def gradients_of(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: Scheme,
    gradient: Gradient,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `fake_quantize` for x, the scale and the zero point, from that of its result."""
    grid = Grid.of(scheme)
    factor = op.scale_factor(x, scale, grid, gradient)
    found: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    found = op.implementation(x).backward(grad, x, scale, zero_point, grid, gradient, factor)
    return found


def dynamic_values(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The values of `fake_quantize_dynamic`, for min-max ranges within rows."""
    block = scheme.block_size(x.shape[-1])
    return dynamic.values_of(x, block, Grid.of(scheme), RangeRule.of(scheme))


def dynamic_codes(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `quantize_dynamic`, for min-max ranges within rows on a symmetric grid."""
    block = scheme.block_size(x.shape[-1])
    codes, scale, _ = dynamic.codes_of(x, block, Grid.of(scheme), RangeRule.of(scheme))
    return codes, scale
