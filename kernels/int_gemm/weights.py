"""Weights laid out once, at load, for the product that the device at hand is good at.

A packed weight stands for `value = (code − shift) · scale`, where `shift` is the zero point less the scheme's
`level_offset`. Wherever the shifted codes still fit the operand they are folded into it (`4q − z`, or `2q + 1` on
a stretched grid, with half the scale), so that the product needs no correction afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.packing import unpack
from qatapult.kernels.scheme import Scheme

from .tiles import TileLayout, slice_width_of, to_tiles

#: `int8`: codes for an integer GEMM, [groups, N, group]. `codes`: the same codes as floats, [N, K], whose products
#: are exact. `values`: dequantized, [N, K]. `tiles`: packed bytes in the Triton kernels' order (`tiles.py`).
Layout = Literal["int8", "codes", "values", "tiles"]

#: Largest magnitude of an int8 activation code.
MAX_ACTIVATION = 128
#: fp32 holds every integer up to here, so sums of products below it are exact in any order.
EXACT_FLOAT32 = 2**24


@dataclass(frozen=True)
class PreparedWeight:
    """A weight ready for `packed_linear`; made by `prepare_weight`.

    Attributes:
        operand: the codes, in the order that `layout` names.
        scale: fp32, [N, G] with G groups along K (1 for per-channel and per-tensor scales).
        shift: fp32, [N, G], subtracted from the codes; None where it is zero or folded into the operand.
        scheme: the weight's grid.
        layout: see `Layout`.
        features: K, the length of the dimension that is summed over.
        exact_span: longest slice of K whose fp32 sums are exact for every activation (layout `codes`).
        slice_width: codes of one slice of a K tile (layout `tiles`).
    """

    operand: Tensor
    scale: Tensor
    shift: Tensor | None
    scheme: Scheme
    layout: Layout
    features: int
    exact_span: int = 0
    slice_width: int = 0

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held: operand, scales and shifts."""
        held = (self.operand, self.scale) + (() if self.shift is None else (self.shift,))
        return sum(t.numel() * t.element_size() for t in held)

    def to(self, device: torch.device | str) -> PreparedWeight:
        """The same layout in another place; use `prepare_weight` to change the layout."""
        shift = None if self.shift is None else self.shift.to(device)
        return replace(self, operand=self.operand.to(device), scale=self.scale.to(device), shift=shift)


@overload
def by_row(values: Tensor, scheme: Scheme, rows: int) -> Tensor: ...
@overload
def by_row(values: None, scheme: Scheme, rows: int) -> None: ...
def by_row(values: Tensor | None, scheme: Scheme, rows: int) -> Tensor | None:
    """Scales or zero points as fp32 [N, G] whatever the granularity, in memory by group: strides (1, N)."""
    if values is None:
        return None
    table = (
        values.detach().float().reshape(1 if scheme.granularity == "tensor" else rows, -1).expand(rows, -1)
    )
    return table.t().contiguous().t()


def scale_and_shift(
    scale: Tensor, zero_point: Tensor | None, scheme: Scheme, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and shifts (zero points less the level offset) as `by_row`."""
    scale, zero = by_row(scale, scheme, rows), by_row(zero_point, scheme, rows)
    if zero is None and scheme.level_offset:
        return scale, torch.full_like(scale, -scheme.level_offset)
    return scale, None if zero is None else zero - scheme.level_offset


def fold_shift(
    codes: Tensor, scale: Tensor, shift: Tensor | None, limit: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the shift into the codes where the result is an integer of magnitude at most `limit`.

    Args:
        codes: int8 [N, K].
        scale: fp32 [N, G].
        shift: fp32 [N, G] in halves, or None.
        limit: 127 for int8 operands, larger for floating-point ones.

    Returns:
        int16 codes, scales and what is left of the shift: all of it where folding would not fit.
    """
    wide = codes.to(torch.int16)
    if shift is None:
        return wide, scale, None
    halves = 2 if bool((shift != shift.round()).any()) else 1
    per_element = (
        (shift * halves).round().to(torch.int16).repeat_interleave(codes.shape[1] // shift.shape[1], 1)
    )
    folded = wide * halves - per_element
    if folded.numel() and int(folded.abs().max()) > limit:
        return wide, scale, shift
    return folded, scale / halves, None


def exact_span(codes: Tensor) -> int:
    """Longest slice of K over which products with int8 codes sum exactly in fp32, for any activations.

    The bound is the largest row sum of magnitudes, which is some four times looser than `K · max|code|`.
    """
    features = codes.shape[1]
    magnitude = codes.abs().float()
    span = features
    while span > 1:
        pieces = magnitude.split(span, dim=1)
        if max(float(piece.sum(1).max()) for piece in pieces) * MAX_ACTIVATION < EXACT_FLOAT32:
            break
        span = (span + 1) // 2
    return span


def prepare_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    activation_scheme: Scheme | None,
) -> PreparedWeight:
    """Lay out codes, int8 [N, K]; see `prepare_weight`."""
    rows, features = codes.shape
    width = slice_width_of(scheme)
    if backend_for(codes) == "triton" and width:
        tiles = to_tiles(codes, TileLayout(scheme.storage_bits, width))
        scale, zero = by_row(scale, scheme, rows), by_row(zero_point, scheme, rows)
        return PreparedWeight(tiles, scale, zero, scheme, "tiles", features, slice_width=width)
    scale, shift = scale_and_shift(scale, zero_point, scheme, rows)
    if activation_scheme is not None and codes.device.type == "cpu" and torch.cpu._is_vnni_supported():
        wide, scale, shift = fold_shift(codes, scale, shift, limit=127)
        groups = wide.to(torch.int8).unflatten(1, (scale.shape[1], -1)).transpose(0, 1).contiguous()
        return PreparedWeight(groups, scale, shift, scheme, "int8", features)
    wide, scale, shift = fold_shift(codes, scale, shift, limit=2**14)
    if shift is not None:
        raise ValueError(f"zero points up to {shift.abs().max():g} are out of reach of the codes")
    if scale.shape[1] == 1 and activation_scheme is not None:
        return PreparedWeight(
            wide.float(), scale, None, scheme, "codes", features, exact_span=max(exact_span(wide), 1)
        )
    values = wide.float() * scale.repeat_interleave(features // scale.shape[1], 1)
    return PreparedWeight(values, scale, None, scheme, "values", features)


def prepare_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    scheme: Scheme,
    features: int,
    activation_scheme: Scheme | None = None,
) -> PreparedWeight:
    """Unpack or reorder a packed weight once, at load, into what `packed_linear` multiplies fastest.

    On the CPU an integer product (`activation_scheme` given) takes int8 codes where the processor has VNNI; elsewhere
    codes held as fp32 (per channel: still exact) or dequantized fp32 (per group). Without activation quantization
    the weight is dequantized. On a GPU the packed bits stay packed and are only put into the kernels' order.

    Args:
        packed: as `pack` gives it, [N, ...].
        scale: fp32, of shape `scheme.scale_shape((N, features))`.
        zero_point: fp32 integers of the scale's shape, or None.
        scheme: the weight's grid.
        features: K, which the packed shape does not tell.
        activation_scheme: per-token scheme of the activations, or None to leave them in floating point.

    Raises:
        ValueError: if shapes, schemes and zero point do not go together.
    """
    check_schemes(scheme, activation_scheme)
    if (zero_point is None) != scheme.symmetric:
        raise ValueError(f"zero_point goes with symmetric=False only; the scheme is {scheme.describe()}")
    codes = unpack(packed, scheme, features)
    expected = scheme.scale_shape(tuple(codes.shape))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; {scheme.describe()} needs {expected}")
    return prepare_codes(codes, scale, zero_point, scheme, activation_scheme)


def check_schemes(weight_scheme: Scheme, activation_scheme: Scheme | None) -> None:
    """Refuse schemes that no product here computes.

    Raises:
        ValueError: naming what would be right.
    """
    if weight_scheme.granularity == "token":
        raise ValueError("weights are scaled per tensor, channel or group, not per token")
    if activation_scheme is None:
        return
    right = activation_scheme.granularity == "token" and activation_scheme.symmetric
    if not right or activation_scheme.grid != "integer":
        raise ValueError(
            f"activations quantized as {activation_scheme.describe()}: "
            "the integer product needs granularity='token', symmetric=True, grid='integer'"
        )
