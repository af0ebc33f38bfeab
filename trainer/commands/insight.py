"""`qatapult insight`: what quantization and training did inside the model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import QuietOption
from qatapult.trainer.commands.report import RunArgument, open_run
from qatapult.trainer.recipe.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("insight")(insight)


def insight(
    run: RunArgument,
    only: Annotated[
        list[str] | None, typer.Option(help="weights, activations, importance or scales; all if absent.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Held-out blocks to run the models on.")] = 4,
    rise: Annotated[float, typer.Option(min=0.001, help="Rise of perplexity that pruning may cost.")] = 0.05,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print insight.json instead of sentences.")] = False,
) -> None:
    """Compare full precision, PTQ and QAT inside: weights on their grid, activations, importance, scales.

    Writes insight.json into the run part by part, so that the same command goes on where it was stopped, and
    builds its report again with a chapter about it.

    Example: qatapult insight runs/smollm2-135m-w4a8 --only weights
    """
    folder = open_run(run)
    from qatapult.trainer.console import Console
    from qatapult.trainer.insight.run import PARTS, InsightSettings, open_context
    from qatapult.trainer.insight.run import insight as analyse
    from qatapult.trainer.report import write_report
    from qatapult.trainer.report.inside import describe

    unknown = sorted(set(only or ()) - set(PARTS))
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not one of {', '.join(PARTS)}")
    parts = tuple(part for part in PARTS if not only or part in only)
    context = open_context(folder, Console(quiet=quiet, as_json=as_json))
    result = analyse(context, InsightSettings(parts, blocks, rise))
    page = write_report(folder)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for part, text in result["sentences"].items():
        typer.echo(f"\n{part}\n  {text}")
    for claim in result["claims"]:
        typer.echo(f"  {claim['verdict']:<12} {claim['claim']}: {describe(claim)}")
    typer.echo(f"\nreport: {page}#inside")
