"""Plots of a study, as SVG: perplexity of each cell before and after training, and the recovery curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from qatapult.trainer.report.plots import BLUE, GREEN, GREY, ORANGE
from qatapult.trainer.study.results import CellResult
from qatapult.trainer.study.schema import Study

_SIZE = (7.2, 4.0)
# Above this ratio of the largest to the smallest perplexity a linear axis shows only the largest.
_WIDE = 4


def write_study_plots(study: Study, results: Sequence[CellResult], folder: Path) -> list[Path]:
    """Draw what the study shows and has data for; the files written."""
    finished = [result for result in results if result.finished]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, draw in (("recovery", _cells), ("curves", _curves)):
        if part not in study.show or not finished:
            continue
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        draw(axes, finished)
        axes.set_ylabel("held-out perplexity")
        axes.legend(frameon=False)
        path = folder / f"{study.name}-{part}.svg"
        figure.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def _cells(axes: Axes, results: Sequence[CellResult]) -> None:
    places = range(len(results))
    series = (
        ("ptq", "round-to-nearest", ORANGE, "x"),
        ("best_ptq", "best PTQ", GREY, "s"),
        ("packed", "QAT, packed integers", BLUE, "o"),
        ("full_precision", "full precision", GREEN, "_"),
    )
    shown = []
    for key, label, colour, marker in series:
        values = [result.perplexity(key).value for result in results]
        points = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, ms=8, mew=2)
            shown += [value for _, value in points]
    if shown and max(shown) > _WIDE * min(shown):
        axes.set_yscale("log")
    axes.set_xticks(list(places), [result.cell.label for result in results], rotation=25, ha="right")


def _curves(axes: Axes, results: Sequence[CellResult]) -> None:
    for result in results:
        curve = result.curve()
        axes.plot(
            [point["tokens"] for point in curve],
            [point["perplexity"] for point in curve],
            "o-",
            ms=3,
            label=result.cell.label,
        )
    full = results[0].perplexity("full_precision").value
    if full is not None:
        axes.axhline(full, color=GREEN, linestyle="--", label="full precision")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("training tokens")
