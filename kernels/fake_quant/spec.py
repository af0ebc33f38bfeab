"""What an operator is told about a `Scheme`: plain numbers, so that they can pass through a registered
operator."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from qatapult.kernels.scheme import ScaleDtype, Scheme

Gradient = Literal["lsq", "pact", "ste"]


class Grid(NamedTuple):
    """Codes in `[qmin, qmax]`, whose values are `(code − zero point + offset) · scale`."""

    qmin: int
    qmax: int
    offset: float

    @classmethod
    def of(cls, scheme: Scheme) -> Grid:
        """The grid of a scheme."""
        return cls(scheme.qmin, scheme.qmax, scheme.level_offset)

    @property
    def binary(self) -> bool:
        """Two levels, ±scale / 2: the value depends on the scale alone, whatever the magnitude of the
        input."""
        return self.qmax - self.qmin == 1

    @property
    def top(self) -> float:
        """The highest level."""
        return self.qmax + self.offset


class RangeRule(NamedTuple):
    """How a scale and a zero point follow from the range of a block (`ranges.py` has the formulas).

    Attributes:
        steps: scales between zero and the end of the range; on an asymmetric grid, between both ends.
        symmetric: no zero point.
        scale_dtype: in which the deployment stores scales.
    """

    steps: float
    symmetric: bool
    scale_dtype: ScaleDtype

    @classmethod
    def of(cls, scheme: Scheme) -> RangeRule:
        """The rule of a scheme."""
        if not scheme.symmetric:
            steps = float(scheme.levels - 1)
        elif scheme.range_method == "absmean":
            top = scheme.qmax + scheme.level_offset
            steps = top if scheme.levels <= 3 else math.sqrt(top) / 2
        else:
            steps = scheme.levels / 2 if scheme.grid == "stretched" else (scheme.levels - 1) / 2
        return cls(steps, scheme.symmetric, scheme.scale_dtype)
