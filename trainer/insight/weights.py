"""How weights lie on their grid: distances to grid points, tails, clipping, and which codes changed.

Positions are measured in steps of the grid (weight / scale), so that layers and models compare. Weights that
have nothing to do with a grid are uniform within a step: then the mean distance to the nearest grid point is
0.25 steps and 20 % of them lie within 0.1 steps. Quantization-aware training with a straight-through
estimator is expected to pull weights towards grid points, and some into oscillation around the boundary
between two (Nagel et al., Overcoming Oscillations in Quantization-Aware Training, arXiv:2203.11086).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qatapult.kernels import Scheme, choose_range
from qatapult.trainer.quantize.modules import QuantizedWeight

#: A weight is near a grid point within so many steps; of uniform weights twice as many are.
NEAR = 0.1
#: Weights beyond so many standard deviations are the tail; of normal ones 0.27 % are.
TAIL = 3.0
_FRACTION_BINS = 40


@dataclass(frozen=True)
class GridFit:
    """How one layer's weights lie on its grid.

    Attributes:
        near: share within `NEAR` steps of a grid point, of the weights inside the grid's range.
        distance: mean distance to the nearest grid point in steps, likewise.
        clipped: share beyond the outermost levels by more than half a step.
        levels_used: mean number of levels that the weights of one scale use.
        entropy_bits: entropy of the codes, in bits.
        kurtosis: excess kurtosis of the weights; 0 for a normal distribution.
        tail: share beyond `TAIL` standard deviations.
        error: norm of what rounding changes, relative to the weights' norm.
        fractions: histogram of (position − nearest grid point), `_FRACTION_BINS` bins over [−0.5, 0.5].
        positions: histogram of the positions, 8 bins a step from half a step below the grid to half a step
            above.
    """

    near: float
    distance: float
    clipped: float
    levels_used: float
    entropy_bits: float
    kurtosis: float
    tail: float
    error: float
    fractions: list[int]
    positions: list[int]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def grid_fit(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> GridFit:
    """Measure how a weight matrix lies on a grid.

    Args:
        weight: `[N, K]`.
        scale: fp32, `scheme.scale_shape([N, K])`.
        zero_point: the same shape, or None on a symmetric grid.
        scheme: the grid.
    """
    weight = weight.detach().float()
    positions = grid_positions(weight, scale, zero_point, scheme)
    codes = positions.round().clamp(scheme.qmin, scheme.qmax)
    offset = positions - codes
    inside = offset.abs() <= 0.5
    distance = offset.abs()[inside]
    rounding = offset * _expanded(scale, weight)
    return GridFit(
        near=_mean(distance <= NEAR),
        distance=_mean(distance),
        clipped=1 - _mean(inside),
        levels_used=_levels_used(codes, scheme),
        entropy_bits=_entropy(
            torch.bincount((codes - scheme.qmin).long().flatten(), minlength=scheme.levels)
        ),
        kurtosis=excess_kurtosis(weight),
        tail=_mean((weight - weight.mean()).abs() > TAIL * weight.std()),
        error=float(rounding.norm() / weight.norm().clamp(min=1e-30)),
        fractions=_histogram(offset[inside], -0.5, 0.5, _FRACTION_BINS),
        positions=_histogram(positions, scheme.qmin - 0.5, scheme.qmax + 0.5, 8 * scheme.levels),
    )


def layer_fit(layer: QuantizedWeight) -> GridFit:
    """How a layer's weights lie on the layer's own grid."""
    assert layer.weight_scheme is not None
    scale, zero_point = layer.grid()
    return grid_fit(layer.weight_matrix(), scale, zero_point, layer.weight_scheme)


def nearest_fit(weight: Tensor, scheme: Scheme) -> GridFit:
    """How weights that know of no grid lie on the one that round-to-nearest would give them."""
    scale, zero_point = choose_range(weight, scheme)
    return grid_fit(weight, scale, zero_point, scheme)


@torch.no_grad()
def grid_positions(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Weights in steps of the grid, so that integers are the codes: `[N, K]`."""
    positions = weight.float() / _expanded(scale.float(), weight) - scheme.level_offset
    return positions if zero_point is None else positions + _expanded(zero_point.float(), weight)


def excess_kurtosis(values: Tensor) -> float:
    """Fourth standardized moment minus 3."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean().clamp(min=1e-60)
    return float(centred.pow(4).mean() / variance.square() - 3)


@torch.no_grad()
def oscillating(snapshots: Sequence[Tensor]) -> float:
    """Share of weights whose code turned back at least once over successive snapshots of the codes.

    Args:
        snapshots: integer codes of the same weights, oldest first; fewer than three cannot turn back.
    """
    if len(snapshots) < 3:
        return 0.0
    turned = torch.zeros_like(snapshots[0], dtype=torch.bool)
    last_move = torch.zeros_like(snapshots[0], dtype=torch.int16)
    for before, after in itertools.pairwise(snapshots):
        move = (after.short() - before.short()).sign()
        turned |= (move * last_move) < 0
        last_move = torch.where(move != 0, move, last_move)
    return _mean(turned)


def changed(before: Tensor, after: Tensor) -> float:
    """Share of codes that differ."""
    return _mean(before != after)


def total(fits: Iterable[tuple[GridFit, int]]) -> dict[str, Any]:
    """All layers together: means weighted by the number of weights, and summed histograms.

    Args:
        fits: the layers' fits, with the number of weights of each.
    """
    pairs = list(fits)
    weights = sum(count for _, count in pairs)
    names = ("near", "distance", "clipped", "levels_used", "entropy_bits", "kurtosis", "tail", "error")
    means = {name: sum(getattr(fit, name) * count for fit, count in pairs) / weights for name in names}
    same_grid = {len(fit.positions) for fit, _ in pairs}
    positions = _summed([fit.positions for fit, _ in pairs]) if len(same_grid) == 1 else None
    return {**means, "fractions": _summed([fit.fractions for fit, _ in pairs]), "positions": positions}


def _expanded(scale: Tensor, weight: Tensor) -> Tensor:
    """Scales `[1]`, `[N, 1]` or `[N, K / group]` as something that broadcasts with `[N, K]`."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        return scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return scale


def _levels_used(codes: Tensor, scheme: Scheme) -> float:
    width = codes.numel() if scheme.granularity == "tensor" else scheme.block_size(codes.shape[1])
    ordered = codes.reshape(-1, width).sort(dim=1).values
    return float(1 + (ordered.diff(dim=1) != 0).sum(dim=1).double().mean())


def _entropy(counts: Tensor) -> float:
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum())


def _histogram(values: Tensor, low: float, high: float, bins: int) -> list[int]:
    return [int(count) for count in torch.histc(values.float(), bins, low, high)]


def _summed(histograms: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*histograms, strict=True)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
