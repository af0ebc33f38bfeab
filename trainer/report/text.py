"""How figures are written: one place, so that terminal, page and comparison agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
# Times the full-precision perplexity from which a model counts as broken.
_BROKEN = 10

#: Keys of a metric in `report.json`, with the titles of their columns in the recovery table.
VALUE_TITLES = (
    ("full_precision", "full precision"),
    ("full_precision_tuned", "fine-tuned control"),
    ("ptq", "PTQ (rtn)"),
    ("best_ptq", "best PTQ"),
    ("qat", "QAT"),
    ("packed", "packed integers"),
)


def dollars(value: float) -> str:
    """`$2,496`, `−$310`, and `$0.04` where whole dollars would say nothing."""
    digits = 2 if 0 < abs(value) < 10 else 0
    return f"{'−' if value < 0 else ''}${abs(value):,.{digits}f}"


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


def duration(seconds: float | None) -> str:
    """`41 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class Column:
    """A column of the recovery table: a key of a metric, its title and how its figure is written."""

    key: str
    title: str
    write: Callable[[Any], str]

    def show(self, metric: Mapping[str, Any]) -> str:
        return self.write(metric.get(self.key))


VALUES = tuple(Column(*column, number) for column in VALUE_TITLES)
RECOVERIES = (
    Column("recovery", "recovered", percent),
    Column("recovery_interval", "95 % interval", interval),
)
#: The perplexity of a broken model is astronomically large, and any training wins back "100 %" of it.
LOG_RECOVERIES = (
    Column("recovery_log", "of log-perplexity", percent),
    Column("recovery_log_interval", "95 % interval", interval),
)
BEYOND_PTQ = (
    Column("recovery_from_best_ptq", "beyond best PTQ", percent),
    Column("recovery_from_best_ptq_interval", "95 % interval", interval),
)


def shows_log_recovery(report: Mapping[str, Any]) -> bool:
    """Whether recovery has to be read in log-perplexity too: at 3 bits and below, and where PTQ broke the model."""
    weights = (report.get("recipe", {}).get("quantization") or {}).get("weights") or {}
    metric = report["metrics"].get("perplexity", {})
    full, ptq = metric.get("full_precision"), metric.get("ptq")
    return weights.get("bits", 16) <= 3 or (full is not None and ptq is not None and ptq > _BROKEN * full)


def metric_columns(report: Mapping[str, Any]) -> list[Column]:
    """Columns of the recovery table; values that no metric has are left out."""
    metrics = report["metrics"].values()
    only_rtn = all(metric.get("best_ptq_method") in (None, "rtn") for metric in metrics)
    values = [column for column in VALUES if any(metric.get(column.key) is not None for metric in metrics)]
    recoveries = [*RECOVERIES, *(LOG_RECOVERIES if shows_log_recovery(report) else ())]
    if only_rtn:
        return [*(column for column in values if column.key != "best_ptq"), *recoveries]
    return [*values, *recoveries, *BEYOND_PTQ]


def metric_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The recovery table for a terminal: a header of metrics, then one row a model: it stays narrow."""
    metrics = report["metrics"]
    rows = [["", *metrics]]
    for column in metric_columns(report):
        rows.append([column.title, *(column.show(metric) for metric in metrics.values())])
    return rows


def cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """What each stage took, for a terminal: a header, one row a stage, and the whole run."""
    costs = report.get("cost", {})
    rows = [["", "wall time", "peak memory"]]
    for stage, cost in costs.items():
        rows.append([stage, duration(cost["seconds"]), byte_size(cost["peak_memory_bytes"])])
    whole = sum(cost["seconds"] for cost in costs.values())
    peak = max((cost["peak_memory_bytes"] for cost in costs.values()), default=None)
    return [*rows, ["whole run", duration(whole), byte_size(peak)]]
