"""The page of a study: Markdown with tables and plots, the brief's figures beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatapult.trainer.report.text import ABSENT, duration, interval, number, percent, shows_log_recovery
from qatapult.trainer.run_folder import write_atomically, write_json
from qatapult.trainer.study.plots import write_study_plots
from qatapult.trainer.study.results import CellResult, Figure, read_curve
from qatapult.trainer.study.schema import Study

#: Below this share of the full-precision perplexity a cost is no cost: a recovery of it would be noise.
_NOTHING = 0.005


@dataclass(frozen=True)
class TableColumn:
    """A column: its title, and what a cell shows in it."""

    title: str
    show: Callable[[CellResult], str]


def write_page(study: Study, size: str, results: Sequence[CellResult], folder: Path, command: str) -> Path:
    """Write `<study>.md` with its plots, and `<study>.json` with the figures, into a folder.

    Args:
        study: the study.
        size: which of its sizes was run.
        results: its cells, finished or not.
        folder: where to.
        command: what gives this page, for the reader.

    Returns:
        The Markdown file.
    """
    plots = write_study_plots(study, results, folder)
    write_json(folder / f"{study.name}.json", [figures(result) for result in results])
    path = folder / f"{study.name}.md"
    write_atomically(path, render(study, size, results, [plot.name for plot in plots], command))
    return path


def render(study: Study, size: str, results: Sequence[CellResult], plots: Sequence[str], command: str) -> str:
    """The page's Markdown."""
    parts = [f"# {study.title}", study.question, f"```bash\n{command}\n```", _conditions(size, results)]
    unfinished = [result.cell.label for result in results if not result.finished]
    if unfinished:
        parts.append(f"Not run yet: {', '.join(unfinished)}.")
    if "recovery" in study.show:
        parts.append(table(recovery_columns(results), results))
        parts.append(_LEGEND)
    if "curves" in study.show:
        parts += ["## Length", table(curve_columns(), [r for r in results if read_curve(r.curve())])]
    if "tasks" in study.show:
        parts += ["## By task", *(task_table(results))]
    parts += [f"![{study.title}]({plot})" for plot in plots]
    if study.notes:
        parts.append("\n".join(f"- {note}" for note in study.notes))
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Recovery is `(PTQ − packed) / (PTQ − full precision)` of the held-out perplexity, measured on the "
    "packed integer model. In brackets, or behind ±, stands the 95 % interval: of the mean over seeds where "
    "a cell has several, else by bootstrap over held-out documents."
)


def recovery_columns(results: Sequence[CellResult]) -> list[TableColumn]:
    """The columns of the recovery table that any of the cells has something in."""
    columns = [
        TableColumn("", lambda result: result.cell.label),
        _value("full precision", "full_precision"),
        _value("fine-tuned control", "full_precision_tuned"),
    ]
    methods = dict.fromkeys(
        method for result in results for report in result.reports for method in _methods(report)
    )
    columns += [_method(name) for name in methods]
    columns += [
        TableColumn("QAT, packed", lambda result: _with_reach(result.perplexity("packed"), number)),
        _share("recovered", "recovery"),
        _share("beyond the best PTQ", "recovery_from_best_ptq"),
    ]
    if any(shows_log_recovery(report) for result in results for report in result.reports):
        columns.append(_share("recovered, log-perplexity", "recovery_log"))
    columns += [
        TableColumn("the brief", lambda result: result.cell.brief or ABSENT),
        TableColumn("elsewhere", lambda result: result.cell.literature or ABSENT),
        TableColumn("time", lambda result: duration(result.seconds())),
    ]
    kept = (column for column in columns if any(column.show(result) != ABSENT for result in results))
    return list(kept)


def curve_columns() -> list[TableColumn]:
    """What the recovery curves say: where training pays, and where it stops to."""

    def reading(show: Callable[[Any], str]) -> Callable[[CellResult], str]:
        return lambda result: show(read_curve(result.curve()))

    return [
        TableColumn("", lambda result: result.cell.label),
        TableColumn("95 % of the gain after", reading(lambda read: f"{read.flat_tokens:,} tokens")),
        TableColumn("best after", reading(lambda read: f"{read.best_tokens:,} tokens")),
        TableColumn("risen again by", reading(lambda read: percent(read.rose_by, 2))),
        TableColumn(
            "early stopping after",
            reading(lambda read: f"{read.stopped_tokens:,} tokens" if read.stopped_tokens else "never"),
        ),
        TableColumn("and would have kept", reading(lambda read: number(read.stopped_perplexity))),
    ]


def task_table(results: Sequence[CellResult]) -> list[str]:
    """One table a cell: how much of each task came back."""
    tables = []
    for result in results:
        rows = [["task", "full precision", "PTQ (rtn)", "QAT, packed", "recovered"]]
        for task in result.tasks():
            values = [number(result.metric(task, key).value) for key in ("full_precision", "ptq", "packed")]
            rows.append([task, *values, _with_reach(result.metric(task, "recovery"), percent)])
        if len(rows) > 1:
            tables += [f"### {result.cell.label}", markdown_table(rows)]
    return tables


def table(columns: Sequence[TableColumn], results: Sequence[CellResult]) -> str:
    """A Markdown table of finished cells."""
    shown = [result for result in results if result.finished]
    header = [column.title for column in columns]
    return markdown_table([header, *([column.show(result) for column in columns] for result in shown)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def figures(result: CellResult) -> dict[str, Any]:
    """One cell for machines."""
    values = ("full_precision", "full_precision_tuned", "ptq", "best_ptq", "packed")
    shares = ("recovery", "recovery_log", "recovery_from_best_ptq")
    shown = {key: result.perplexity(key) for key in (*values, *shares)}
    return {
        "name": result.cell.name,
        "label": result.cell.label,
        "seeds": len(result.reports),
        "quantization": result.reports[0]["recipe"]["quantization"] if result.reports else None,
        **{key: figure.value for key, figure in shown.items()},
        **{f"{key}_interval": figure.interval for key, figure in shown.items() if figure.interval},
        "methods": {name: result.method(name) for report in result.reports[:1] for name in _methods(report)},
        "curve": result.curve(),
        "brief": result.cell.brief,
        "seconds": result.seconds(),
    }


def _conditions(size: str, results: Sequence[CellResult]) -> str:
    reports = [report for result in results for report in result.reports]
    if not reports:
        return "No run is finished yet."
    recipe, environment = reports[0]["recipe"], reports[0]["environment"]
    tokens = sorted({report["recipe"]["qat"]["tokens"] for report in reports})
    lengths = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    held_out = recipe["data"]["evaluation_blocks"] * recipe["data"]["block_size"]
    device = environment.get("device") or environment.get("cpu") or "this machine"
    return (
        f"Size `{size}`: {len(reports)} runs of {lengths} training tokens, {held_out:,} held-out tokens, "
        f"on {device}. Stages that runs share were computed once; each run's time counts them."
    )


def _methods(report: dict[str, Any]) -> list[str]:
    return list(report["metrics"]["perplexity"]["ptq_methods"])


def _value(title: str, key: str) -> TableColumn:
    return TableColumn(title, lambda result: number(result.perplexity(key).value))


def _method(name: str) -> TableColumn:
    return TableColumn(name, lambda result: number(result.method(name)))


def _share(title: str, key: str) -> TableColumn:
    before = "best_ptq" if key == "recovery_from_best_ptq" else "ptq"

    def show(result: CellResult) -> str:
        full, quantized = (result.perplexity(name).value for name in ("full_precision", before))
        if full is not None and quantized is not None and quantized < full * (1 + _NOTHING):
            return "nothing to recover"
        return _with_reach(result.perplexity(key), percent)

    return TableColumn(title, show)


def _with_reach(figure: Figure, write: Callable[[float | None], str]) -> str:
    """`92 % (89–95 %)`, `16.53 ± 0.12`: the figure with its interval, if it has one."""
    if figure.value is None or figure.interval is None:
        return write(figure.value)
    if write is percent:
        return f"{percent(figure.value)} ({interval(figure.interval)})"
    return f"{write(figure.value)} ± {(figure.interval[1] - figure.interval[0]) / 2:.2g}"
