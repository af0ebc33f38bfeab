"""Weights laid out once, at load, for the product that the device at hand is good at.

A packed weight stands for `value = (code − shift) · scale`, where `shift` is the zero point less the scheme's
`level_offset`. Wherever the shifted codes still fit the operand they are stored instead of the codes, so
that the product needs no correction afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.int_gemm import vnni
from qatapult.kernels.int_gemm.tiles import TileLayout, slice_width_of, to_tiles
from qatapult.kernels.packing import unpack
from qatapult.kernels.scheme import Scheme

#: `vnni`: codes of 4 or 8 bits in the order of `vnni.cpp`. `int8`: codes for torch's integer GEMM, [groups,
#: N, group]. `codes`: the same codes as floats, [N, K], whose products are exact. `values`: dequantized,
#: [N, K]. `tiles`: packed bytes in the Triton kernels' order (`tiles.py`).
Layout = Literal["vnni", "int8", "codes", "values", "tiles"]

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
        few, few_scale: the codes once more, int8 [N, K], and their scales, for products of a few tokens
            (layouts `codes` and `values`, where activations are quantized).
    """

    operand: Tensor
    scale: Tensor
    shift: Tensor | None
    scheme: Scheme
    layout: Layout
    features: int
    exact_span: int = 0
    slice_width: int = 0
    few: Tensor | None = None
    few_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held: operand, scales and shifts."""
        held = (self.operand, self.scale, self.shift, self.few, self.few_scale)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def to(self, device: torch.device | str) -> PreparedWeight:
        """The same layout in another place; use `prepare_weight` to change the layout."""
        held = ("operand", "scale", "shift", "few", "few_scale")
        tensors = {name: getattr(self, name) for name in held if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


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


def fold_shift(codes: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Move the shift into int8 codes where the result fits: `q − z`, or `2q + 1` at half the scale.

    Returns:
        Codes, scales and what is left of the shift: all of it where folding would not fit.
    """
    if shift is None:
        return codes, scale, None
    steps = 2 if bool((shift != shift.round()).any()) else 1
    shifted = shift_codes(codes, shift) * steps
    if shifted.numel() and float(shifted.abs().max()) > 127:
        return codes, scale, shift
    return shifted.to(torch.int8), scale / steps, None


def shift_codes(codes: Tensor, shift: Tensor | None) -> Tensor:
    """`codes − shift` in fp32, exactly; [N, K] and [N, G]."""
    values = codes.float()
    if shift is not None:
        values.unflatten(1, (shift.shape[1], -1)).sub_(shift[..., None])
    return values


def exact_span(values: Tensor, scheme: Scheme, zero_point: Tensor | None) -> int:
    """Longest slice of K over which products with int8 codes sum exactly in fp32, for any activations.

    First by the grid alone, `K · max|code| · 128 < 2^24`; where that is too short for a row, by the largest
    row sum of magnitudes, some four times longer. Halves count twice.
    """
    features = values.shape[1]
    halves = 2 if scheme.level_offset else 1
    largest = (scheme.levels if zero_point is not None else -scheme.qmin) * halves
    span = (EXACT_FLOAT32 - 1) // (MAX_ACTIVATION * largest)
    if zero_point is not None and not bool(((zero_point >= scheme.qmin) & (zero_point <= scheme.qmax)).all()):
        span = 1
    if span >= features:
        return features
    magnitude, span = values.abs(), features
    while span > 1:
        sums = torch.stack([piece.sum(1).max() for piece in magnitude.split(span, dim=1)])
        if float(sums.max()) * MAX_ACTIVATION * halves < EXACT_FLOAT32:
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
        folded, scale, shift = fold_shift(codes, scale, shift)
        groups = folded.unflatten(1, (scale.shape[1], -1)).transpose(0, 1).contiguous()
        return PreparedWeight(groups, scale, shift, scheme, "int8", features)
    values = shift_codes(codes, shift)
    if scale.shape[1] == 1 and activation_scheme is not None:
        span = max(1, exact_span(values, scheme, zero_point))
        return PreparedWeight(values, scale, None, scheme, "codes", features, exact_span=span)
    values.unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None])
    return PreparedWeight(values, scale, None, scheme, "values", features)


def prepare_vnni(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
) -> PreparedWeight | None:
    """Codes in the order of `vnni.cpp`; None for groups that it does not take."""
    rows, features = codes.shape
    scale, shift = scale_and_shift(scale, zero_point, scheme, rows)
    if not vnni.takes(features, scale.shape[1]):
        return None
    if scheme.level_offset:  # at most four levels: twice as many fit the four bits
        codes, scale, shift = codes * 2 + 1, scale / 2, None
    return PreparedWeight(vnni.to_vnni(codes, scheme), scale, shift, scheme, "vnni", features)


def with_few(
    weight: PreparedWeight, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> PreparedWeight:
    """Add the int8 codes for products of a few tokens, where zero points can be folded into them."""
    scale, shift = scale_and_shift(scale, zero_point, weight.scheme, codes.shape[0])
    folded, scale, shift = fold_shift(codes, scale, shift)
    return weight if shift is not None else replace(weight, few=folded, few_scale=scale.contiguous())


def prepare_unpacked(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, activation_scheme: Scheme
) -> PreparedWeight:
    """Lay out codes that will be used once, as in training: as whole bytes, which takes one copy."""
    if backend_for(codes) != "triton":
        return prepare_codes(codes, scale, zero_point, scheme, activation_scheme)
    if scheme.level_offset:
        codes, scale = codes * 2 + 1, scale / 2
    whole = replace(scheme, bits=8, grid="integer")
    return prepare_codes(codes, scale, zero_point, whole, activation_scheme)


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

    On the CPU an integer product (`activation_scheme` given) takes codes of 4 or 8 bits where the processor has
    VNNI; elsewhere codes held as fp32 (per channel: still exact) or dequantized fp32 (per group). Without
    activation quantization the weight is dequantized. On a GPU the packed bits stay packed and are only put
    into the kernels' order.

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
    if activation_scheme is not None and backend_for(codes) == "cpu" and vnni.available():
        in_tiles = prepare_vnni(codes, scale, zero_point, scheme)
        if in_tiles is not None:
            return in_tiles
    weight = prepare_codes(codes, scale, zero_point, scheme, activation_scheme)
    if weight.layout in ("codes", "values") and activation_scheme is not None and codes.device.type == "cpu":
        return with_few(weight, codes, scale, zero_point)
    return weight


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
