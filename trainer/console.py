"""What a person sees in the terminal: stages, progress, and the recovery table at the end.

On a terminal it is coloured and alive; without one, under Slurm, or on a dumb terminal it prints plain lines
that read well in a log file. Progress goes to standard error and results to standard output, so that a pipe
gets results only. `NO_COLOR` is respected (by rich).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qatapult.trainer.report.text import cost_rows, duration, metric_rows, percent

#: Seconds between two lines of plain progress: a log of a day stays below 3000 lines.
PLAIN_INTERVAL = 30.0
_NO_LIMIT = 1000


class Meter(Protocol):
    """Handle of a running progress display."""

    def update(self, completed: int, **figures: float | str | None) -> None:
        """Show how far it got.

        Args:
            completed: units done since the beginning (not since the last call), so that a resumed run starts
                right.
            figures: named figures to show beside it, such as `loss=0.53, tokens_per_second=1200`.
        """


class Console:
    """The terminal of a run. Only the process of rank 0 writes.

    Args:
        quiet: print nothing but the final table and warnings.
        as_json: the caller prints JSON to standard output: no table either.
        out: where results go; standard output if absent.
        err: where progress goes; standard error if absent.
    """

    def __init__(
        self, quiet: bool = False, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        main = int(os.environ.get("RANK", "0")) == 0
        self.shows_progress = main and not quiet
        self.shows_results = main and not as_json
        self.main = main
        self._out, self._err = _open(out or sys.stdout), _open(err or sys.stderr)
        self.plain = is_plain(self._err.file)

    def stage(self, name: str, note: str = "") -> None:
        """Announce a stage: `Console.stage("ptq", "gptq, 64 blocks")`."""
        if self.shows_progress:
            text = f"[bold cyan]{name:<9}[/] {note}" if not self.plain else f"{name:<9} {note}"
            self._err.print(text.rstrip(), markup=not self.plain)

    def say(self, message: str) -> None:
        """One line of progress."""
        if self.shows_progress:
            self._err.print(message, markup=False)

    def warn(self, message: str) -> None:
        """One line that even `--quiet` shows."""
        if self.main:
            self._err.print(f"warning: {message}", style="" if self.plain else "yellow", markup=False)

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Meter]:
        """Show progress of long work.

        Args:
            total: units of the whole work (steps, blocks, tokens).
            description: what it is, in a word or two.
        """
        if not self.shows_progress:
            yield _Silent()
        elif self.plain:
            meter = _PlainMeter(self._err, total, description)
            yield meter
            meter.finish()
        else:
            columns = (
                TextColumn("{task.description:<9}", style="bold cyan"),
                BarColumn(bar_width=28),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            with Progress(*columns, console=self._err) as bar:
                yield _LiveMeter(bar, bar.add_task(description, total=total, figures=""))

    def table(self, report: Mapping[str, Any]) -> None:
        """Print the recovery table of a `report.json`, headline first, and what each stage took."""
        if not self.shows_results:
            return
        self._out.print()
        self._out.print(report["headline"], style="bold", markup=False)
        self.rows(*metric_rows(report), strong=("packed integers", "recovered"))
        for note in report.get("notes", []):
            self._out.print(f"  {note}", markup=False)
        if report.get("cost"):
            self.rows(*cost_rows(report), strong=("whole run",))

    def rows(self, header: Sequence[str], *rows: Sequence[str], strong: Sequence[str] = ()) -> None:
        """Print a table; the first column is text, the others are figures.

        Args:
            header: titles of the columns.
            rows: their cells.
            strong: first cells of the rows to print in bold.
        """
        plain = is_plain(self._out.file)
        table = Table(box=box.ASCII2 if plain else box.ROUNDED)
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right", no_wrap=plain)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in strong else "")
        self._out.print(table)


def describe_figures(figures: Mapping[str, float | str | None]) -> str:
    """`loss 0.5312  1,204 tok/s`: the figures beside a progress bar; absent ones are left out."""
    parts = []
    for name, value in figures.items():
        if value is None:
            continue
        if isinstance(value, str):
            parts.append(f"{name.replace('_', ' ')} {value}")
        elif name == "tokens_per_second":
            parts.append(f"{value:,.0f} tok/s")
        else:
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "  ".join(parts)


class _Silent:
    def update(self, completed: int, **figures: float | str | None) -> None:
        """Nothing is shown."""


class _LiveMeter:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, completed: int, **figures: float | str | None) -> None:
        self._bar.update(self._task, completed=completed, figures=describe_figures(figures))


class _PlainMeter:
    """A line now and then: the first, one every `PLAIN_INTERVAL` seconds, and the last."""

    def __init__(self, console: RichConsole, total: int, description: str) -> None:
        self._console, self._total, self._description = console, total, description
        self._started = time.monotonic()
        self._printed_at = -float("inf")
        self._first: int | None = None
        self._latest: tuple[int, str] | None = None

    def update(self, completed: int, **figures: float | str | None) -> None:
        if self._first is None:
            self._first = completed
        self._latest = (completed, describe_figures(figures))
        if time.monotonic() - self._printed_at >= PLAIN_INTERVAL:
            self._print()

    def finish(self) -> None:
        if self._latest is not None:
            self._print()

    def _print(self) -> None:
        assert self._latest is not None
        assert self._first is not None
        completed, figures = self._latest
        elapsed = time.monotonic() - self._started
        parts = [
            f"{self._description:<9} {completed}/{self._total} ({percent(completed / max(self._total, 1))})"
        ]
        parts.append(figures)
        if self._first < completed < self._total:
            left = elapsed * (self._total - completed) / (completed - self._first)
            parts.append(f"{duration(left)} left")
        elif completed >= self._total:
            parts.append(f"in {duration(elapsed)}")
        self._console.print("  ".join(part for part in parts if part), markup=False)
        self._printed_at, self._latest = time.monotonic(), None


def _open(stream: TextIO) -> RichConsole:
    # A log file has no width: lines and tables get the room that they need instead of 80 columns.
    return RichConsole(file=stream, highlight=False, width=_NO_LIMIT if is_plain(stream) else None)


def is_plain(stream: IO[str]) -> bool:
    """Whether to print lines only: no terminal, a batch job, or a terminal that cannot move its cursor."""
    terminal = hasattr(stream, "isatty") and stream.isatty()
    return not terminal or "SLURM_JOB_ID" in os.environ or os.environ.get("TERM") == "dumb"
