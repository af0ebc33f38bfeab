"""Scales and zero points for a given tensor.

A range `[low, high]`, which always holds zero, is found in each block of the tensor by `scheme.range_method`:

* `minmax`: all of the block. On a symmetric grid `high = max|x|`, `low = −high`.
* `percentile`: the same without the largest magnitudes (asymmetric: without both tails, half the share each).
* `mse`: the min-max range times the factor, among `MSE_FACTORS`, with the least squared error.
* `absmean`: `high = mean|x|`; symmetric grids only.

From it follows the scale, with `L` the number of levels and `t` the top level:

* symmetric: `high / ((L − 1) / 2)`, so that the levels reach from −high to high (compressed-tensors' rule:
absmax
  over 7.5 at 4 bits, over 127.5 at 8); on the stretched grid `high / (L / 2)`, whose *cells* do (SEQ of
  ParetoQ, arXiv:2502.02631, starts from it);
* symmetric with `absmean`: `high / t` for ternary (BitNet b1.58, arXiv:2402.17764) and binary (±mean|x|),
else
  `2 · high / √t` (LSQ's start, arXiv:1902.08153, section 2.1);
* asymmetric: `(high − low) / (L − 1)` with the zero point `clamp(round(qmin − low / scale), qmin, qmax)`.

Scales are rounded to `scheme.scale_dtype` and returned as fp32. A block whose scale would be zero (all its
values are zero, or so small that the scale underflows) gets the scale 1, so that its codes are zero and
nothing is divided by zero. A NaN counts as zero and ±inf as the largest finite fp32 number.
"""

from __future__ import annotations

import math

import torch

from qatapult.kernels.fake_quant.op import fake_quantize
from qatapult.kernels.fake_quant.spec import Grid, RangeRule
from qatapult.kernels.scheme import Scheme

#: Shrink factors that the mean-square-error search tries.
MSE_FACTORS = tuple(1 - 0.02 * step for step in range(41))
#: Elements that the search works on at a time. On a CPU they fit the cache (measured four times faster than
#: 2^22); a GPU wants fewer launches.
MSE_CHUNK = {"cpu": 1 << 18}
MSE_CHUNK_ELSEWHERE = 1 << 22


@torch.no_grad()
def choose_range(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, and zero point where the grid is asymmetric, of `x` by `scheme.range_method`.

    Args:
        x: fp32, bf16 or fp16, any shape.
        scheme: the grid and the method; see the top of this module.

    Returns:
        `(scale, zero_point)`, both fp32 of `scheme.scale_shape(x.shape)`; the zero point holds integers in
        `[qmin, qmax]` and is None on a symmetric grid.
    """
    shape = scheme.scale_shape(tuple(x.shape))
    blocks = x.detach().reshape(math.prod(shape), -1 if x.numel() else 0)
    # On meta there are shapes and nothing to search for.
    if scheme.range_method == "mse" and not x.is_meta:
        chunk = MSE_CHUNK.get(x.device.type, MSE_CHUNK_ELSEWHERE)
        step = max(1, chunk // max(1, blocks.shape[1]))
        parts = [_search(finite(part), scheme) for part in blocks.split(step)]
        low, high = (torch.cat(bounds) for bounds in zip(*parts, strict=True))
    else:
        low, high = _bounds(finite(blocks), scheme)
    scale, zero_point = scale_of_range(low, high, Grid.of(scheme), RangeRule.of(scheme))
    return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def scale_from_clip(clip: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scale that puts the top level at `clip`: PACT's learned clipping value (arXiv:1805.06085),
    differentiable.

    Args:
        clip: positive, of the scale's shape.
        scheme: the grid.
    """
    return clip / (scheme.qmax + scheme.level_offset)


def finite(blocks: torch.Tensor) -> torch.Tensor:
    """In fp32, NaN as zero and ±inf as the largest finite number."""
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
    return minmax_of(blocks, scheme.symmetric)


def minmax_of(blocks: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each row, zero included; on a symmetric grid the largest magnitude both
    ways."""
    low, high = blocks.aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
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
    cut = (count - math.ceil(scheme.percentile * count)) // 2
    low = blocks.kthvalue(1 + cut, dim=1).values.clamp(max=0)
    return low, blocks.kthvalue(count - cut, dim=1).values.clamp(min=0)


def _search(blocks: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The shrunk min-max range of each block with the least squared error."""
    low, high = _bounds(blocks, scheme)
    grid, rule = Grid.of(scheme), RangeRule.of(scheme)
    best_error = torch.full_like(low, math.inf)
    best = torch.ones_like(low)
    for factor in MSE_FACTORS:
        scale, zero_point = scale_of_range(low * factor, high * factor, grid, rule)
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
    values = fake_quantize(blocks, scale, zero_point, scheme=rows, gradient="ste")
    return (values - blocks).square().sum(1)


def scale_of_range(
    low: torch.Tensor, high: torch.Tensor, grid: Grid, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point that lay the grid over `[low, high]`, which holds zero; all of one shape, fp32."""
    # A tensor as divisor: on CUDA, a Python number would be multiplied with as a rounded reciprocal.
    steps = torch.full_like(high, rule.steps)
    if rule.symmetric:
        return _stored(high / steps, rule), None
    scale = _stored((high - low) / steps, rule)
    return scale, (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)


def _stored(scale: torch.Tensor, rule: RangeRule) -> torch.Tensor:
    """The scale as the deployment holds it: rounded to its dtype, finite, and never zero."""
    dtype: torch.dtype = getattr(torch, rule.scale_dtype)
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    return torch.where(scale == 0, 1.0, scale)
