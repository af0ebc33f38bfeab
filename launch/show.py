"""Tables for people, of what `state` and `doctor` found."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qatapult.launch.doctor import FAIL, OK, Finding
from qatapult.launch.folder import LaunchFolder
from qatapult.launch.state import RunState
from qatapult.trainer.run_folder import STAGES

_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "stopped": "yellow",
}


def table(states: Sequence[RunState]) -> None:
    """Print the runs, one a line, and below them why those that stopped did."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state", "stage", "step", "loss", "recovery", "tokens/s", "left", "job"):
        rows.add_column(
            heading, justify="left" if heading in ("run", "state", "stage") else "right", no_wrap=True
        )
    for state in states:
        rows.add_row(
            Text(state.name),
            Text(state.state, style=_COLOURS.get(state.state, "")),
            _stage(state),
            "" if state.step is None else str(state.step),
            "" if state.loss is None else f"{state.loss:.4f}",
            "" if state.recovery is None else f"{100 * state.recovery:.1f} %",
            "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
            "" if state.seconds_left is None else duration(state.seconds_left),
            Text(state.job or ""),
        )
    # A name that is cut is of no use to the other commands: a narrow terminal wraps the lines instead.
    wanted = Measurement.get(Console(), Console().options.update(width=1000), rows).maximum
    console = Console(width=max(Console().width, wanted))
    console.print(rows)
    for state in states:
        if state.reason:
            console.print(Text(f"{state.name}: {state.reason}"), soft_wrap=True)


def details(launch: LaunchFolder, state: RunState) -> None:
    """Print one run in full."""
    console = Console()
    table([state])
    console.print(f"stages   {', '.join(state.stages) or 'none finished yet'}", markup=False)
    console.print(f"folder   {state.folder}", markup=False, soft_wrap=True)
    submission = launch.submission
    if submission is not None and submission.job_log:
        console.print(f"job log  {submission.job_log}", markup=False, soft_wrap=True)
    for line in launch.read_attempts():
        when = time.strftime("%F %T", time.localtime(line["time"]))
        if line["event"] == "begin":
            text = f"attempt {line['attempt']} began on {line['where']} with {line['ranks']} ranks"
        elif line["event"] == "end":
            text = f"attempt {line['attempt']} {line['how']}: {line['reason']}"
        else:
            text = "sent off again"
        console.print(f"{when}  {text}", markup=False, soft_wrap=True, highlight=False)


def findings(found: Sequence[Finding]) -> None:
    """Print the doctor's findings, and what to do about each that is not well."""
    console = Console()
    width = max(len(finding.name) for finding in found)
    for finding in found:
        colour = "green" if finding.level == OK else "red" if finding.level == FAIL else "yellow"
        line = Text(f"{finding.level:4}  ", style=colour)
        line.append(f"{finding.name:{width}}  {finding.detail}", style="default")
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':{width + 6}}  → {finding.remedy}"), soft_wrap=True)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _stage(state: RunState) -> str:
    """The stage that a run is in."""
    if state.state == "finished":
        return ""
    return next((stage for stage in STAGES if stage not in state.stages), "")
