"""Real numbers to integer codes and back: the one place where the grid of a `Scheme` is applied.

Every block of a tensor (see `scheme.py`) is contiguous once the tensor is, so all granularities are the same
problem: `x` seen as `[blocks, elements per block]` with one scale and at most one zero point a block. With
`v = x / scale` in fp32, `z` the zero point (0 on a symmetric grid) and `o` the level offset (1/2 on an even
stretched grid, else 0),

    level = round(clamp(v − o, qmin − z, qmax − z))        round half to even
    code  = level + z
    value = (level + o) · scale

which equals `clamp(round(v − o) + z, qmin, qmax)` because the bounds are integers.

Values that are not finite: a NaN takes the code of zero, ±inf the highest and the lowest code.
"""

from __future__ import annotations

import torch

from qatapult.kernels.blocks import as_blocks, as_columns, check_scale
from qatapult.kernels.fake_quant.op import quantize_codes
from qatapult.kernels.scheme import Scheme


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Codes of `x` on the grid of `scheme`.

    Args:
        x: fp32, bf16 or fp16, any shape; the last dimension is the one that groups divide.
        scale: `scheme.scale_shape(x.shape)`, positive; fp32, or a dtype that fp32 holds.
        zero_point: as `scale`, holding integers; None on a symmetric grid.
        scheme: the grid.

    Returns:
        int8 codes in `[scheme.qmin, scheme.qmax]`, of the shape of `x`.

    Raises:
        ValueError: if the scale's shape does not fit.
    """
    check_scale(x, scale, zero_point, scheme)
    return quantize_codes(x, scale, zero_point, scheme)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Values of codes: `(code − zero_point + level offset) · scale`, in fp32 and then rounded to `dtype`.

    Args:
        codes: integers in `[scheme.qmin, scheme.qmax]`, any shape.
        scale: `scheme.scale_shape(codes.shape)`.
        zero_point: as `scale`, or None on a symmetric grid.
        scheme: the grid.
        dtype: of the result.

    Raises:
        ValueError: if the scale's shape does not fit.
    """
    check_scale(codes, scale, zero_point, scheme)
    step, zero = as_columns(scale.detach(), None if zero_point is None else zero_point.detach())
    values = (as_blocks(codes, scale).float() - zero + scheme.level_offset) * step
    return values.to(dtype).reshape(codes.shape)
