"""`qatapult export`: a finished run in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    export_format: Annotated[
        str, typer.Option("--format", help="compressed-tensors, gguf, torchao or safetensors.")
    ] = "compressed-tensors",
    output: Annotated[Path | None, typer.Option(help="Where it goes; by default into the run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a run's trained model in a format, load it with that format's own runtime, and measure it.

    Example: qatapult export runs/smollm2-135m-w4a8 --format compressed-tensors
    """
    from qatapult.trainer.recipe.errors import UserError
    from qatapult.trainer.recipe.schema import ExportFormat

    if export_format not in get_args(ExportFormat):
        raise UserError(f"--format {export_format!r} is not one of {', '.join(get_args(ExportFormat))}")
    if not (run / "stages" / "packed.json").exists():
        raise UserError(f"{run} has no packed model yet; finish the run with qatapult train")

    from qatapult.trainer.evaluate.models import RunModels
    from qatapult.trainer.stages.export import write

    result = write(RunModels(run).context, export_format, output)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(
        f"{result['path']}: {result['bytes']:,} bytes, perplexity {result['perplexity']:.4f} in its own "
        f"runtime, {result['difference']:+.2%} against the packed integers"
    )
