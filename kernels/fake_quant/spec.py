"""What an operator is told about a `Scheme`: plain numbers, so that they can pass through a registered operator."""

from __future__ import annotations

from typing import Literal, NamedTuple

from qatapult.kernels.scheme import Scheme

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
        """Two levels, ±scale / 2: the value depends on the scale alone, whatever the magnitude of the input."""
        return self.qmax - self.qmin == 1

    @property
    def top(self) -> float:
        """The highest level."""
        return self.qmax + self.offset
