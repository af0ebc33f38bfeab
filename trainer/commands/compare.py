"""`qatapult compare`: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Names or folders of runs, or folders that hold runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "comparison.html"
    ),
    price: Annotated[
        float | None, typer.Option(help="Price of one device for an hour; adds curves over cost.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON and write no page.")
    ] = False,
) -> None:
    """Put runs side by side: a table here, and a page with curves and the Pareto front of size and
    perplexity.

    Example: qatapult compare runs/w4a8 runs/w8a8 --price 2.5
    """
    from qatapult.trainer.commands.report import open_runs
    from qatapult.trainer.console import Console
    from qatapult.trainer.report import compare as comparing

    compared = comparing.compare([run for path in runs for run in open_runs(path)], price)
    if as_json:
        typer.echo(json.dumps(compared, indent=2, ensure_ascii=False))
        return
    shown = [
        column
        for column in comparing.COLUMNS
        if column.key not in ("tokens", "peak_memory_bytes", "best_ptq")
    ]
    rows = ([column.show(entry) for column in shown] for entry in compared["runs"])
    Console().rows([column.title for column in shown], *rows)
    typer.echo(f"comparison: {comparing.write_comparison(compared, output)}")
