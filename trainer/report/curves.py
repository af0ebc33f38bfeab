"""Curves of a run: the columns of `metrics.jsonl` over tokens, thinned for drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Keys of a line of `metrics.jsonl` that are axes, not figures.
AXES = ("step", "tokens", "time")


@dataclass
class Curve:
    """One figure over the run: parallel lists, ordered by tokens.

    Attributes:
        tokens: tokens trained on so far.
        times: seconds since the epoch.
        values: the figure.
    """

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def append(self, tokens: int, time: float, value: float) -> None:
        """Add a point. A run that rolled back or was resumed goes over tokens again: the new points win."""
        while self.tokens and self.tokens[-1] >= tokens:
            self.tokens.pop(), self.times.pop(), self.values.pop()
        self.tokens.append(tokens)
        self.times.append(time)
        self.values.append(value)

    def thinned(self, points: int) -> Curve:
        """At most about `points` points that keep the shape: the lowest and the highest of each stretch.

        Averages would hide the spikes that a reader looks for; extremes keep them where they are.
        """
        if len(self.tokens) <= points or points < 4:
            return self
        stretches = points // 2
        keep = {0, len(self.tokens) - 1}
        for stretch in range(stretches):
            first = stretch * len(self.tokens) // stretches
            last = (stretch + 1) * len(self.tokens) // stretches
            indices = range(first, last)
            keep.add(min(indices, key=self.values.__getitem__))
            keep.add(max(indices, key=self.values.__getitem__))
        chosen = sorted(keep)
        return Curve(
            [self.tokens[i] for i in chosen],
            [self.times[i] for i in chosen],
            [self.values[i] for i in chosen],
        )


@dataclass
class Curves:
    """All curves of a run and its events (rollbacks, skipped steps)."""

    by_name: dict[str, Curve] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl`; figures that are not finite are left out of the curves."""
        if "event" in line:
            self.events.append(dict(line))
        tokens, time = line.get("tokens"), line.get("time")
        if tokens is None:
            return
        for name, value in line.items():
            if name in AXES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                self.by_name.setdefault(name, Curve()).append(tokens, time or 0.0, value)

    def get(self, name: str) -> Curve:
        return self.by_name.get(name, Curve())


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Curves of all figures of a run, from the lines of its `metrics.jsonl`."""
    curves = Curves()
    for line in lines:
        curves.add(line)
    return curves


@dataclass(frozen=True)
class Span:
    """A stretch of a progressive schedule: which grid from which to which token."""

    start: float
    end: float
    label: str


def phases(recipe: Mapping[str, Any]) -> list[Span]:
    """The schedule in tokens, for shading: progressive grids, and stretches before quantization starts."""
    qat = recipe.get("qat") or {}
    tokens, schedule = qat.get("tokens") or 0, qat.get("schedule") or {}
    spans, start = [], 0.0
    for phase in schedule.get("phases") or ():
        end = start + phase["fraction"] * tokens
        spans.append(Span(start, end, f"W{phase['weights']['bits']:g}"))
        start = end
    for key, label in (
        ("weights_start", "weights not yet quantized"),
        ("activations_start", "activations not yet"),
    ):
        if schedule.get(key):
            spans.append(Span(0.0, schedule[key] * tokens, label))
    return spans
