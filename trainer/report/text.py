"""How figures are written: one place, so that terminal, page and comparison agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "–"

#: Keys of a metric in `report.json`, with the titles of their columns.
COLUMNS = (
    ("full_precision", "full precision"),
    ("ptq", "PTQ (rtn)"),
    ("best_ptq", "best PTQ"),
    ("qat", "QAT"),
    ("packed", "packed integers"),
)


def number(value: float | None, digits: int = 4) -> str:
    """`16.53`, `0.8125`, `1.2e+06`: four significant digits, and a dash for what is absent."""
    if value is None:
        return ABSENT
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(digits - len(str(int(abs(value)))), 0)}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """`92 %`."""
    return ABSENT if share is None else f"{100 * share:.{digits}f} %"


def interval(bounds: Sequence[float] | None, digits: int = 0) -> str:
    """`89–95 %`, or a dash."""
    if not bounds:
        return ABSENT
    low, high = (f"{100 * bound:.{digits}f}" for bound in bounds)
    return f"{low} to {high} %" if float(low) < 0 else f"{low}–{high} %"


def byte_size(count: float | None) -> str:
    """`82.4 MB`, decimal units."""
    if count is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def metric_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The recovery table as text: a header, then one row a metric.

    Columns that no metric fills are left out; the control is shown where it was run.
    """
    metrics: Mapping[str, Mapping[str, Any]] = report["metrics"]
    columns = [pair for pair in COLUMNS if any(metric.get(pair[0]) is not None for metric in metrics.values())]
    if any(metric.get("full_precision_tuned") is not None for metric in metrics.values()):
        columns.insert(1, ("full_precision_tuned", "fine-tuned"))
    header = ["metric", *(title for _, title in columns), "recovered", "95 % interval", "of best PTQ's loss"]
    rows = [
        [
            name,
            *(number(metric.get(key)) for key, _ in columns),
            percent(metric.get("recovery")),
            interval(metric.get("recovery_interval")),
            percent(metric.get("recovery_from_best_ptq")),
        ]
        for name, metric in metrics.items()
    ]
    return [header, *rows]
