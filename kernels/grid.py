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

from .scheme import Scheme


def as_blocks(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` as `[scale.numel(), elements per scale]`: a view where `x` is contiguous."""
    return x.reshape(scale.numel(), -1) if x.numel() else x.reshape(scale.numel(), 0)


def check_scale(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> None:
    """Refuse scales and zero points that do not belong to a tensor of the shape of `x` under `scheme`.

    Raises:
        ValueError: naming the shape that would be right.
    """
    expected = scheme.scale_shape(tuple(x.shape)) if x.ndim else (1,)
    scalar = scheme.granularity == "tensor" and scale.numel() == 1
    if tuple(scale.shape) != expected and not scalar:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not go with a tensor of shape {tuple(x.shape)} on "
            f"{scheme.describe()}: its shape would be {expected}"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point of shape {tuple(zero_point.shape)} must have the scale's shape {tuple(scale.shape)}"
        )
    if zero_point is not None and scheme.symmetric:
        raise ValueError(f"zero_point given for the symmetric {scheme.describe()}; set symmetric=False")


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
    quotient = as_blocks(x.detach(), scale).float() / scale.detach().float().reshape(-1, 1)
    zero = _zero(scale, zero_point)
    # nan_to_num would also replace infinities, by numbers that are clamped all the same.
    level = (quotient.nan_to_num(nan=0.0) - scheme.level_offset).clamp(scheme.qmin - zero, scheme.qmax - zero)
    return (level.round() + zero).to(torch.int8).reshape(x.shape)


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
    level = as_blocks(codes, scale).float() - _zero(scale, zero_point)
    values = (level + scheme.level_offset) * scale.detach().float().reshape(-1, 1)
    return values.to(dtype).reshape(codes.shape)


def _zero(scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Zero points as `[blocks, 1]` integers in fp32: a learned one is a real number that is rounded in use."""
    if zero_point is None:
        return torch.zeros(scale.numel(), 1, device=scale.device)
    return zero_point.detach().float().reshape(-1, 1).round()
