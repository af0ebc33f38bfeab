"""Fake-quantization in plain torch: the formulas that the other backends are compared with.

All functions see the tensor as `[blocks, elements per block]` with `scale` and `zero` as `[blocks, 1]` in
fp32.
"""

from __future__ import annotations

import torch

from qatapult.kernels.blocks import as_blocks, as_columns
from qatapult.kernels.fake_quant.spec import Gradient, Grid


def forward(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """`(level + offset) · scale`, `level = round(clamp(x / scale − offset, qmin − zero, qmax − zero))`."""
    level, _, step, _ = _levels(x, scale, zero_point, grid)
    return (level * step).to(x.dtype).reshape(x.shape)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid,
    gradient: Gradient,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the input, the scale and the zero point where they have one; `op.fake_quantize` has the
    rules."""
    level, quotient, step, zero = _levels(x, scale, zero_point, grid)
    inside = (quotient >= grid.qmin - zero) & (quotient <= grid.qmax - zero + 2 * grid.offset)
    grad = as_blocks(grad, scale).float()
    grad_x = torch.where(inside, grad, 0.0).to(x.dtype).reshape(x.shape)
    if gradient == "ste":
        return grad_x, None, None
    if gradient == "pact":
        per_scale = torch.where(inside, 0.0, level)
    elif grid.binary:
        per_scale = level
    else:
        per_scale = torch.where(inside, level - quotient, level)
    grad_scale = ((grad * per_scale).sum(1) * factor).reshape(scale.shape)
    if zero_point is None:
        return grad_x, grad_scale, None
    grad_zero = torch.where(inside, 0.0, -grad * step).sum(1) * factor
    return grad_x, grad_scale, grad_zero.reshape(scale.shape)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """int8 codes `level + zero`; a NaN takes the code of zero."""
    step, zero = as_columns(scale, zero_point)
    quotient = (as_blocks(x, scale).float() / step).nan_to_num(nan=0.0)
    level = (quotient - grid.offset).clamp(grid.qmin - zero, grid.qmax - zero).round()
    return (level + zero).to(torch.int8).reshape(x.shape)


def _levels(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What multiplies the scale, the quotients `x / scale`, the scales and the zero points."""
    step, zero = as_columns(scale, zero_point)
    quotient = as_blocks(x, scale).float() / step
    level = (quotient - grid.offset).clamp(grid.qmin - zero, grid.qmax - zero).round()
    # Adding +0 turns −0 into the +0 that an integer code stands for.
    return level + 0.0 + grid.offset, quotient, step, zero
