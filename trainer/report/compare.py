"""Runs side by side: a table, curves over tokens, hours and cost, and a Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.report.curves import Curve, read_curves
from qatapult.trainer.report.pages import SELF_CONTAINED, compressed_plotly, json_block, templates
from qatapult.trainer.report.summary import summarize
from qatapult.trainer.report.text import Column, byte_size, duration, interval, number, percent
from qatapult.trainer.run_folder import RunFolder, write_atomically

#: A pause this many times longer than the usual step is a stop between two jobs, not work.
_PAUSE = 10
_POINTS = 400

COLUMNS = (
    Column("name", "run", str),
    Column("format", "format", str),
    Column("full_precision", "full precision", number),
    Column("ptq", "PTQ (rtn)", number),
    Column("best_ptq", "best PTQ", number),
    Column("packed", "packed", number),
    Column("recovery", "recovered", percent),
    Column("recovery_interval", "95 % interval", interval),
    Column("recovery_from_best_ptq", "beyond best PTQ", percent),
    Column("bytes", "size", byte_size),
    Column("tokens", "tokens", lambda count: f"{count:,}" if count else "–"),
    Column("seconds", "time", duration),
    Column("peak_memory_bytes", "peak memory", byte_size),
)


def compare(runs: Sequence[RunFolder], price: float | None = None) -> dict[str, Any]:
    """Gather what the comparison shows.

    Args:
        runs: folders of the runs, finished or not.
        price: of one device (GPU, or machine without one) for an hour, in any currency.

    Returns:
        `{"runs": [row, …], "curves": [{"name", "tokens", "hours", "cost", "perplexity"}, …], "pareto": [name,
        …]}`; rows have the keys of `COLUMNS`, `cost` is None without a price.

    Raises:
        UserError: if a folder is not a run.
    """
    rows, curves = [], []
    for run in runs:
        if not run.recipe.exists():
            raise UserError(f"{run.path} is not a run: it has no recipe.yaml")
        report = summarize(run)
        rows.append(row(report))
        metrics = read_curves(run.read_metrics())
        steps = (
            metrics.get("train/loss") if metrics.get("train/loss").times else metrics.get("eval/perplexity")
        )
        curve = metrics.get("eval/perplexity").thinned(_POINTS)
        hours = working_hours(curve, steps)
        devices = report["environment"].get("processes") or 1
        curves.append(
            {
                "name": report["name"],
                "tokens": curve.tokens,
                "hours": hours,
                "cost": [value * devices * price for value in hours] if price is not None else None,
                "perplexity": curve.values,
            }
        )
    return {"runs": rows, "curves": curves, "pareto": pareto(rows)}


def row(report: Mapping[str, Any]) -> dict[str, Any]:
    """One run in the table."""
    metric, costs = report["metrics"]["perplexity"], report["cost"].values()
    seconds = sum(cost.get("seconds") or 0 for cost in costs)
    keys = ("full_precision", "ptq", "best_ptq", "qat", "packed")
    recoveries = ("recovery", "recovery_interval", "recovery_from_best_ptq")
    return {
        "name": report["name"],
        "format": report["format"],
        "finished": report["finished"],
        **{key: metric.get(key) for key in (*keys, *recoveries)},
        "bytes": report["bytes"],
        "tokens": report["training"].get("tokens"),
        "seconds": seconds or None,
        "peak_memory_bytes": max((cost.get("peak_memory_bytes") or 0 for cost in costs), default=0) or None,
    }


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the runs that no other run beats in both size and perplexity, smallest first."""
    known = [entry for entry in rows if entry["bytes"] is not None and entry["packed"] is not None]
    front: list[str] = []
    best = float("inf")
    for entry in sorted(known, key=lambda entry: (entry["bytes"], entry["packed"])):
        if entry["packed"] < best:
            best = entry["packed"]
            front.append(entry["name"])
    return front


def working_hours(curve: Curve, steps: Curve) -> list[float]:
    """Hours of work at each point of a curve, without the pauses between interrupted jobs.

    Args:
        curve: the points to place.
        steps: the densest curve of the run, from which pauses are told.
    """
    if not steps.times:
        return [0.0] * len(curve.times)
    gaps = [max(later - earlier, 0.0) for earlier, later in zip(steps.times, steps.times[1:], strict=False)]
    usual = statistics.median(gaps) if gaps else 0.0
    worked, elapsed = [0.0], 0.0
    for gap in gaps:
        elapsed += gap if gap <= _PAUSE * usual else usual
        worked.append(elapsed)
    hours, position = [], 0
    for tokens in curve.tokens:
        while position + 1 < len(steps.tokens) and steps.tokens[position + 1] <= tokens:
            position += 1
        hours.append(worked[position] / 3600 if steps.tokens[position] <= tokens else 0.0)
    return hours


def write_comparison(compared: Mapping[str, Any], path: Path) -> Path:
    """Write the page, as self-contained as a report."""
    columns = [
        column for column in COLUMNS if any(entry.get(column.key) is not None for entry in compared["runs"])
    ]
    page = (
        templates()
        .get_template("compare.html.jinja")
        .render(
            policy=SELF_CONTAINED,
            plotly=compressed_plotly(),
            data=json_block(dict(compared)),
            columns=columns,
            runs=compared["runs"],
            front=compared["pareto"],
            best=min(
                (r for r in compared["runs"] if r["packed"] is not None),
                key=lambda r: r["packed"],
                default=None,
            ),
            number=number,
            percent=percent,
        )
    )
    write_atomically(path, page)
    return path
