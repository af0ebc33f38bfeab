"""The order in which the Triton kernels read packed weights.

K is cut into slices of `slice_width` codes, and slices into units that fill whole bytes: a unit of b-bit
codes is `8 / b` slices in one plane of bytes, in whose byte `i` slice `s` keeps its code `i` at bit `s ·
b`. So a shift and a mask of a whole plane give a slice, with no shuffling between neighbours. Three bits
take eight slices in three planes: the codes' two high bits of slices 0–3, of slices 4–7, and the low bit of
all eight.

A unit's planes are stored for all rows before the next unit follows, `[units, planes, N, slice_width]`, so
that a program's tile is one contiguous piece of memory. Kernels move a slice's codes to the top of their
bytes: signs need no extension, the sums come out 2^(8 − b) times too large, exactly, and the half that a
stretched grid adds is one bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qatapult.kernels.scheme import Scheme

#: Rows are padded to whole tiles of the largest block of output channels, so that loads need no mask.
ROW_MULTIPLE = 128
#: `tl.dot` on int8 takes at least this many codes along K.
MIN_SLICE = 32


@dataclass(frozen=True)
class TileLayout:
    """Geometry of a packed weight.

    Attributes:
        bits: stored bits of a code.
        slice_width: codes of a slice.
        slices: slices of a unit.
        planes: byte planes of a unit.
    """

    bits: int
    slice_width: int

    @property
    def slices(self) -> int:
        return 8 if self.bits == 3 else 8 // self.bits

    @property
    def planes(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def unit(self) -> int:
        """Codes along K of one unit."""
        return self.slices * self.slice_width

    def takes_whole_units(self, group: int) -> bool:
        """Whether both slices of a unit go into one product: 4 bits, and one scale for all of a unit."""
        return self.bits == 4 and group % self.unit == 0

    def span(self, group: int) -> int:
        """Slices that lie within one group of a unit, wherever the unit starts; all of them for `group` 0."""
        return math.gcd(self.slices, group // self.slice_width) if group else self.slices


def slice_width_of(scheme: Scheme) -> int | None:
    """Slice width for a scheme; None where groups are no multiples of a slice: then no kernel here fits."""
    group = scheme.group_size or 0
    return next((width for width in (64, 32) if group % width == 0), None)


def to_tiles(codes: Tensor, layout: TileLayout) -> Tensor:
    """Pack int8 codes [N, K] into uint8 [units, planes, N padded, slice_width]."""
    rows, features = codes.shape
    padding = (0, -features % layout.unit, 0, -rows % ROW_MULTIPLE)
    if layout.bits == 8:
        whole = pad(codes, padding) if any(padding) else codes
        return (
            whole.view(torch.uint8)
            .unflatten(1, (-1, layout.slice_width))
            .transpose(0, 1)[:, None]
            .contiguous()
        )
    padded = pad(codes.to(torch.int32), padding)
    # [units, slices, N, slice_width]
    slices = padded.unflatten(1, (-1, layout.slices, layout.slice_width)).permute(1, 2, 0, 3)
    if layout.bits == 3:
        high, low = slices >> 1 & 3, slices & 1
        planes = [_bytes(high[:, :4], 2), _bytes(high[:, 4:], 2), _bytes(low, 1)]
    else:
        planes = [_bytes(slices & (1 << layout.bits) - 1, layout.bits)]
    return torch.stack(planes, dim=1).contiguous()


def from_tiles(tiles: Tensor, layout: TileLayout, rows: int, features: int) -> Tensor:
    """The inverse of `to_tiles`: int8 codes [N, K]."""
    planes = tiles.to(torch.int32)
    if layout.bits == 3:
        high = torch.cat([_slices(planes[:, 0], 2), _slices(planes[:, 1], 2)], dim=1)
        slices = high << 1 | _slices(planes[:, 2], 1)
    else:
        slices = _slices(planes[:, 0], layout.bits)
    sign = 1 << layout.bits - 1
    codes = (slices ^ sign) - sign
    return codes.permute(2, 0, 1, 3).flatten(1)[:rows, :features].to(torch.int8)


def _bytes(slices: Tensor, bits: int) -> Tensor:
    """[units, slices, N, width] → uint8 [units, N, width], slice s at bit s · bits."""
    shifts = torch.arange(0, 8, bits, device=slices.device).view(1, -1, 1, 1)
    return (slices << shifts).sum(1).to(torch.uint8)


def _slices(plane: Tensor, bits: int) -> Tensor:
    """The inverse of `_bytes`, codes unsigned."""
    shifts = torch.arange(0, 8, bits, device=plane.device).view(1, -1, 1, 1)
    return plane[:, None] >> shifts & (1 << bits) - 1
