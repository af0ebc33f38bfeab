"""`qatapult report`: rebuild a run's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.run_folder import RunFolder

RunArgument = Annotated[str, typer.Argument(help="A run's name or folder.", metavar="RUN")]


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
) -> None:
    """Build or rebuild report.json, report.html and the plots of a run, finished or still going on.

    Example: qatapult report runs/smollm2-135m-w4a8
    """
    from qatapult.trainer.console import Console
    from qatapult.trainer.report import write_report

    folder = open_run(run)
    page = write_report(folder)
    content = json.loads(folder.report_json.read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    Console().table(content)
    typer.echo(f"report: {page}")


def open_run(name: str) -> RunFolder:
    """The run of that name in `runs/`, or at that path.

    Raises:
        UserError: if there is none.
    """
    from qatapult.launch.folder import find_run

    return find_run(name, Path("runs")).run


def open_runs(name: str) -> list[RunFolder]:
    """The run of that name or path, or all runs in a folder of runs."""
    from qatapult.launch.folder import all_runs

    inside = [launch.run for launch in all_runs(Path(name))] if Path(name).is_dir() else []
    return inside or [open_run(name)]
