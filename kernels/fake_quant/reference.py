"""Fake-quantization in plain torch: the formulas that the other backends are compared with.

All functions see the tensor as `[blocks, elements per block]` with `scale` and `zero` as `[blocks, 1]` in fp32.
"""

from __future__ import annotations

import torch

from qatapult.kernels.grid import as_blocks
from .spec import Gradient, Grid


def forward(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """`(level + offset) · scale` with `level = round(clamp(x / scale − offset, qmin − zero, qmax − zero))`."""
    values, _, _ = _quantized(x, scale, zero_point, grid)
    return values.to(x.dtype).reshape(x.shape)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid,
    gradient: Gradient,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input, the scale and the zero point; see `op.fake_quantize` for the rules."""
    values, quotient, zero = _quantized(x, scale, zero_point, grid)
    step = scale.float().reshape(-1, 1)
    level = values / step
    inside = (quotient >= grid.qmin - zero) & (quotient <= grid.qmax - zero + 2 * grid.offset)
    grad = as_blocks(grad, scale).float()
    if gradient == "pact":
        per_scale = torch.where(inside, 0.0, level)
    elif grid.binary:
        per_scale = level
    else:
        per_scale = torch.where(inside, level - quotient, level)
    grad_x = torch.where(inside, grad, 0.0).to(x.dtype).reshape(x.shape)
    grad_scale = (grad * per_scale).sum(1) * factor
    grad_zero = torch.where(inside, 0.0, -grad * step).sum(1) * factor
    return grad_x, grad_scale.reshape(scale.shape), grad_zero.reshape(scale.shape)


def _quantized(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fake-quantized blocks, the quotients `x / scale` and the zero points."""
    step = scale.float().reshape(-1, 1)
    zero = torch.zeros_like(step) if zero_point is None else zero_point.float().reshape(-1, 1).round()
    quotient = as_blocks(x, scale).float() / step
    level = (quotient - grid.offset).clamp(grid.qmin - zero, grid.qmax - zero).round()
    # Adding +0 turns −0 into the +0 that an integer code stands for.
    return (level + 0.0 + grid.offset) * step, quotient, zero
