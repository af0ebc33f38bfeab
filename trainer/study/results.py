"""What a study found: figures of each cell over its seeds, and what its recovery curves say."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as students_t

from qatapult.trainer.study.plan import PlannedRun
from qatapult.trainer.study.schema import Cell

#: Share of the whole gain at which the curve counts as flat from there on.
_FLAT = 0.95
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure with its interval.

    Attributes:
        value: mean over the seeds, or the one value.
        interval: 95 % interval of the mean over seeds (Student's t), or the run's own (bootstrap over
            documents) where there is one seed; None if neither can be had.
        seeds: how many.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    seeds: int = 1


@dataclass(frozen=True)
class CellResult:
    """One row: the figures of `report.json`'s perplexity, by their keys, and those of the tasks."""

    cell: Cell
    reports: list[dict[str, Any]] = field(repr=False)

    @property
    def finished(self) -> bool:
        return bool(self.reports)

    def perplexity(self, key: str) -> Figure:
        """A figure of the perplexity: `packed`, `recovery`, `recovery_from_best_ptq`, …"""
        return self.metric("perplexity", key)

    def metric(self, metric: str, key: str) -> Figure:
        """A figure of any metric."""
        entries = [report["metrics"].get(metric, {}) for report in self.reports]
        values = [entry.get(key) for entry in entries]
        known = [value for value in values if value is not None]
        if not known:
            return Figure(None)
        own = entries[0].get(f"{key}_interval")
        if len(known) > 1:
            return Figure(statistics.fmean(known), over_seeds(known), len(known))
        return Figure(known[0], (own[0], own[1]) if own else None)

    def method(self, name: str) -> float | None:
        """Perplexity of a post-training method."""
        values = [report["metrics"]["perplexity"]["ptq_methods"].get(name) for report in self.reports]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def tasks(self) -> list[str]:
        """Names of the tasks that were measured."""
        return [name for name in (self.reports[0]["metrics"] if self.reports else ()) if name != "perplexity"]

    def curve(self) -> list[Mapping[str, float]]:
        """The first seed's recovery curve, from the post-training result that it started from."""
        if not self.reports:
            return []
        metric, wanted = self.reports[0]["metrics"]["perplexity"], self.reports[0]["recipe"]["ptq"]
        method = (
            metric["best_ptq_method"] if wanted["initialize_from"] == "best" else wanted["initialize_from"]
        )
        start = {"tokens": 0, "perplexity": metric["ptq_methods"][method]}
        return [start, *self.reports[0]["curve"]]

    def seconds(self) -> float | None:
        """Mean wall time of a run, all its stages together."""
        if not self.reports:
            return None
        return statistics.fmean(
            sum(cost.get("seconds") or 0 for cost in report["cost"].values()) for report in self.reports
        )


def collect(planned: Sequence[PlannedRun], runs: Path) -> list[CellResult]:
    """Read the reports of a study's finished runs, cell by cell."""
    by_cell: dict[str, CellResult] = {}
    for run in planned:
        result = by_cell.setdefault(run.cell.name, CellResult(run.cell, []))
        folder = run.folder(runs)
        if folder.stage("report").exists():
            result.reports.append(json.loads(folder.report_json.read_text(encoding="utf-8")))
    return list(by_cell.values())


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values, by Student's t."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = float(students_t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


@dataclass(frozen=True)
class CurveReading:
    """What a recovery curve says about the length of training.

    Attributes:
        best_tokens: where the held-out perplexity was lowest.
        flat_tokens: from where on less than a twentieth of the whole gain was still to come.
        rose_by: by how much the perplexity rose again after its best, as a share of the best.
        stopped_tokens: where early stopping with a patience of one evaluation would have stopped, or None.
        stopped_perplexity: the best perplexity it would have kept.
    """

    best_tokens: int
    flat_tokens: int
    rose_by: float
    stopped_tokens: int | None
    stopped_perplexity: float


def read_curve(curve: Sequence[Mapping[str, float]]) -> CurveReading | None:
    """Read a curve of `{"tokens", "perplexity"}`, in order of tokens; None for fewer than two points."""
    if len(curve) < 2:
        return None
    best = min(curve, key=lambda point: point["perplexity"])
    gain = curve[0]["perplexity"] - best["perplexity"]
    flat = next(p for p in curve if curve[0]["perplexity"] - p["perplexity"] >= _FLAT * gain)
    stopped, kept = None, curve[0]["perplexity"]
    for point in curve[1:]:
        if point["perplexity"] >= kept:
            stopped = int(point["tokens"])
            break
        kept = point["perplexity"]
    return CurveReading(
        best_tokens=int(best["tokens"]),
        flat_tokens=int(flat["tokens"]),
        rose_by=curve[-1]["perplexity"] / best["perplexity"] - 1,
        stopped_tokens=stopped,
        stopped_perplexity=kept,
    )
