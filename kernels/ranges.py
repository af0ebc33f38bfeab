"""Scales and zero points for a given tensor.

| `range_method` | symmetric                                                       | asymmetric             |
|----------------|-----------------------------------------------------------------|------------------------|
| `minmax`       | `max|x| / ((levels − 1) / 2)`, stretched: `max|x| / (levels / 2)` | `(max − min) / (levels − 1)`, 0 inside |
| `percentile`   | the same with that quantile of `|x|`                            | both tails cut alike   |
| `mse`          | the `minmax` range shrunk by the factor with the least squared error | likewise          |
| `absmean`      | `mean|x|` over the top level (ternary: BitNet b1.58, arXiv:2402.17764; binary: ±mean|x|), above 2 levels a side `2 mean|x| / √qmax` (LSQ, arXiv:1902.08153, section 2.1) | refused |

Scales are rounded to `scheme.scale_dtype` and returned as fp32. A block whose scale would be zero (all its values
are zero, or so small that the scale underflows) gets the scale 1, so that its codes are zero and nothing is
divided by zero. A NaN counts as zero and ±inf as the largest finite fp32 number.
"""

from __future__ import annotations

import math

import torch

from .grid import dequantize, quantize
from .scheme import Scheme

#: Shrink factors that the mean-square-error search tries.
MSE_FACTORS = tuple(1 - 0.02 * step for step in range(41))
#: Elements that the search works on at a time, which bounds its memory.
MSE_CHUNK = 1 << 22


@torch.no_grad()
def choose_range(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, and zero point where the grid is asymmetric, of `x` by `scheme.range_method`.

    Args:
        x: fp32, bf16 or fp16, any shape.
        scheme: the grid and the method; see the table above.

    Returns:
        `(scale, zero_point)`, both fp32 of `scheme.scale_shape(x.shape)`; the zero point holds integers in
        `[qmin, qmax]` and is None on a symmetric grid.
    """
    shape = scheme.scale_shape(tuple(x.shape))
    blocks = x.detach().reshape(math.prod(shape), -1)
    if scheme.range_method == "mse":
        step = max(1, MSE_CHUNK // max(1, blocks.shape[1]))
        parts = [_search(_finite(part), scheme) for part in blocks.split(step)]
        low, high = (torch.cat(bounds) for bounds in zip(*parts, strict=True))
    else:
        low, high = _bounds(_finite(blocks), scheme)
    scale, zero_point = _grid_of(low, high, scheme)
    return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def scale_from_clip(clip: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scale that puts the top level at `clip`: PACT's learned clipping value (arXiv:1805.06085), differentiable.

    Args:
        clip: positive, of the scale's shape.
        scheme: the grid.
    """
    return clip / (scheme.qmax + scheme.level_offset)


def _finite(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.float().nan_to_num(nan=0.0)


def _bounds(blocks: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The range `[low, high]` that the grid should cover, `[blocks]` each; it always holds zero."""
    if blocks.shape[1] == 0:
        zeros = blocks.new_zeros(blocks.shape[0])
        return zeros, zeros
    if scheme.range_method == "absmean":
        mean = blocks.abs().mean(1)
        return -mean, mean
    if scheme.range_method == "percentile":
        return _percentile(blocks, scheme)
    low, high = blocks.aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _percentile(blocks: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Order statistics without interpolation, which `torch.quantile` refuses above 2^24 elements."""
    count = blocks.shape[1]
    if scheme.symmetric:
        rank = max(1, math.ceil(scheme.percentile * count))
        high = blocks.abs().kthvalue(rank, dim=1).values
        return -high, high
    cut = math.floor((1 - scheme.percentile) / 2 * count)
    low = blocks.kthvalue(1 + cut, dim=1).values.clamp(max=0)
    return low, blocks.kthvalue(count - cut, dim=1).values.clamp(min=0)


def _search(blocks: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The shrunk min-max range of each block with the least squared error."""
    low, high = _bounds(blocks, scheme)
    best_error = torch.full_like(low, math.inf)
    best = torch.ones_like(low)
    for factor in MSE_FACTORS:
        scale, zero_point = _grid_of(low * factor, high * factor, scheme)
        error = _squared_error(blocks, scale, zero_point, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, factor, best)
    return low * best, high * best


def _squared_error(
    blocks: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    rows = Scheme(bits=scheme.bits, granularity="channel", symmetric=scheme.symmetric, grid=scheme.grid)
    scale = scale.reshape(-1, 1)
    zero_point = None if zero_point is None else zero_point.reshape(-1, 1)
    values = dequantize(quantize(blocks, scale, zero_point, rows), scale, zero_point, rows)
    return (values - blocks).square().sum(1)


def _grid_of(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point that lay the grid over `[low, high]`."""
    if not scheme.symmetric:
        scale = _stored((high - low) / (scheme.levels - 1), scheme)
        zero_point = (scheme.qmin - low / scale).round().clamp(scheme.qmin, scheme.qmax)
        return scale, zero_point
    return _stored(high / _steps(scheme), scheme), None


def _steps(scheme: Scheme) -> float:
    """How many scales the range's end lies away from zero on a symmetric grid."""
    if scheme.range_method == "absmean":
        top = scheme.qmax + scheme.level_offset
        return top if scheme.levels <= 3 else math.sqrt(top) / 2
    return scheme.levels / 2 if scheme.grid == "stretched" else (scheme.levels - 1) / 2


def _stored(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale as the deployment holds it: rounded to its dtype, finite, and never zero."""
    dtype: torch.dtype = getattr(torch, scheme.scale_dtype)
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    return torch.where(scale == 0, 1.0, scale)
