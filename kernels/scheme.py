"""The integer grid of a tensor, defined once for training, packing, export and inference.

A tensor is cut into blocks that share one scale (and, on an asymmetric grid, one zero point):

| granularity | tensor shape | scale shape      | block                               |
|-------------|--------------|------------------|-------------------------------------|
| `tensor`    | `[..., K]`   | `[1]`            | everything                          |
| `channel`   | `[N, K]`     | `[N, 1]`         | one output channel (a row)          |
| `group`     | `[N, K]`     | `[N, K / group]` | `group_size` neighbours within a row |
| `token`     | `[..., K]`   | `[..., 1]`       | one token (the last dimension)      |

The grid itself, for codes `q` in `[qmin, qmax]`:

* integer, symmetric:   `x ≈ q · scale`, `q = clamp(round(x / scale), qmin, qmax)`
* integer, asymmetric:  `x ≈ (q − zero_point) · scale`, `q = clamp(round(x / scale) + zero_point, qmin, qmax)`
* stretched (SEQ, ParetoQ, arXiv:2502.02631, section 3): `x ≈ (q + 1/2) · scale` for even numbers of levels,
so
  that the levels of 2 bits are ±0.5 and ±1.5 scales; `q = clamp(round(x / scale − 1/2), qmin, qmax)`.
  With three levels it coincides with the integer grid. Binary weights (1 bit) always use it: ±scale / 2.

Scale arithmetic is fp32, the quotient is a true division (never a product with a reciprocal), and rounding is
half to even. Codes are stored as signed int8 whatever the symmetry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Granularity = Literal["tensor", "channel", "group", "token"]
Grid = Literal["integer", "stretched"]
RangeMethod = Literal["minmax", "mse", "percentile", "absmean"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]

#: Ternary weights carry log2(3) bits; 1.58 is the name that the field gave them.
TERNARY = 1.58
SUPPORTED_BITS = (8, 4, 3, 2, TERNARY, 1)


@dataclass(frozen=True)
class Scheme:
    """How one tensor is laid on an integer grid.

    Attributes:
        bits: 8, 4, 3, 2, 1.58 (ternary) or 1 (binary).
        granularity: which elements share a scale; see the table above.
        group_size: neighbours along the last dimension that share a scale; only with `granularity="group"`.
        symmetric: no zero point.
        grid: `integer`, or `stretched` (levels at half-integers) for 2 bits and fewer.
        range_method: how `choose_range` finds the scale of a given tensor.
        percentile: share of each block's magnitudes inside the range, for `range_method="percentile"`.
        scale_dtype: dtype in which the deployment stores scales; they are rounded to it before use.

    Raises:
        ValueError: for a combination that has no meaning; the message names what would be right.
    """

    bits: float = 8
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    grid: Grid = "integer"
    range_method: RangeMethod = "minmax"
    percentile: float = 0.999
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, SUPPORTED_BITS)
        _one_of("granularity", self.granularity, get_args(Granularity))
        _one_of("grid", self.grid, get_args(Grid))
        _one_of("range_method", self.range_method, get_args(RangeMethod))
        _one_of("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size} does not go with granularity={self.granularity!r}: "
                "give a group_size with granularity='group', and with no other"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        if not 0.5 < self.percentile <= 1:
            raise ValueError(f"percentile={self.percentile} must be above 0.5 and at most 1")
        if self.bits < 2 and not self.symmetric:
            raise ValueError(f"bits={self.bits} is symmetric by definition; set symmetric=True")
        if self.grid == "stretched" and (self.bits > 2 or not self.symmetric):
            raise ValueError("grid='stretched' needs bits of 2, 1.58 or 1 and symmetric=True")
        if self.range_method == "absmean" and not self.symmetric:
            raise ValueError("range_method='absmean' needs symmetric=True")
        if self.bits == 1 and self.grid != "stretched":
            raise ValueError("bits=1 has the two levels ±scale/2; set grid='stretched'")

    @property
    def qmin(self) -> int:
        """Lowest code: −2^(b−1), and −1 for ternary and binary."""
        return -1 if self.bits < 2 else -(2 ** (int(self.bits) - 1))

    @property
    def qmax(self) -> int:
        """Highest code: 2^(b−1) − 1; 1 for ternary, 0 for binary."""
        if self.bits < 2:
            return 1 if self.bits == TERNARY else 0
        return 2 ** (int(self.bits) - 1) - 1

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1

    @property
    def level_offset(self) -> float:
        """What is added to a code before it is multiplied with the scale: 1/2 on an even stretched grid."""
        return 0.5 if self.grid == "stretched" and self.levels % 2 == 0 else 0.0

    @property
    def storage_bits(self) -> int:
        """Bits a packed code occupies: ternary codes are stored in two."""
        return 2 if self.bits == TERNARY else int(self.bits)

    def block_size(self, features: int) -> int:
        """Elements along a last dimension of `features` that share a scale.

        Raises:
            ValueError: if the group size does not divide it.
        """
        if self.group_size is None:
            return features
        if features % self.group_size:
            divisors = [g for g in (32, 64, 128, 256) if features % g == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide {features} features; "
                f"{' or '.join(map(str, divisors)) or 'a divisor'} would"
            )
        return self.group_size

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of this shape; see the table above."""
        if self.granularity == "tensor":
            return (1,)
        if self.group_size is None:
            return (*shape[:-1], 1)
        return (*shape[:-1], shape[-1] // self.block_size(shape[-1]))

    def describe(self) -> str:
        """Short name: `int4 g64`, `int4 channel asymmetric`, `ternary channel`, `binary g64`."""
        number = {TERNARY: "ternary", 1: "binary"}.get(self.bits, f"int{self.bits:g}")
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        stretched = " stretched" if self.grid == "stretched" and self.bits == 2 else ""
        return f"{number} {where}{stretched}{'' if self.symmetric else ' asymmetric'}"


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(str, allowed))}")
