"""`qatapult checkpoint ls|verify|merge`: what a run's checkpoints are, and a model folder out of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.recipe.errors import UserError

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, or one checkpoint's.", metavar="FOLDER")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="A run's checkpoints.", no_args_is_help=True)
    group.command("ls")(ls)
    group.command("verify")(verify)
    group.command("merge")(merge)
    app.add_typer(group, name="checkpoint")


def ls(
    run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False
) -> None:
    """Table of a run's checkpoints: step, tokens, perplexity, size, and what wrote them.

    Example: qatapult checkpoint ls runs/smollm2-135m-w4a8
    """
    from rich.console import Console as Terminal
    from rich.table import Table

    from qatapult.trainer.loop.checkpoint import describe_checkpoint

    rows = [describe_checkpoint(folder) for folder in _checkpoints(run)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("checkpoint", "tokens", "perplexity", "MiB", "written by", "")
    for row in rows:
        perplexity = "" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
        writer = f"{row['engine']}, {row['processes']} process{'es' * (row['processes'] > 1)}"
        size = f"{row['bytes'] / 2**20:,.1f}"
        table.add_row(
            row["name"], f"{row['tokens']:,}", perplexity, size, writer, "best" if row["best"] else ""
        )
    Terminal().print(table)


def verify(run: RunArgument) -> None:
    """Read every file of the checkpoints and compare it with its checksum; exit status 2 if one is damaged.

    Example: qatapult checkpoint verify runs/smollm2-135m-w4a8
    """
    from qatapult.trainer.loop.checkpoint import verify_checkpoint

    faults = []
    for folder in _checkpoints(run):
        try:
            verify_checkpoint(folder)
            typer.echo(f"{folder.name}: whole")
        except UserError as error:
            faults.append(str(error))
            typer.echo(f"{folder.name}: damaged")
    if faults:
        raise UserError(faults[0])


def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder for its newest one.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
) -> None:
    """Write an ordinary Hugging Face folder of a checkpoint's whole weights, with the learned scales beside them.

    Example: qatapult checkpoint merge runs/smollm2-135m-w4a8/checkpoints/step-60 --out merged
    """
    from qatapult.trainer.merge import merge_checkpoint

    folder = _checkpoints(checkpoint)[-1]
    weights, scales = merge_checkpoint(folder, out)
    typer.echo(f"{out}: {weights} weights in model.safetensors, {scales} scales in scales.safetensors")


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named."""
    from qatapult.trainer.loop.checkpoint import MANIFEST, list_checkpoints
    from qatapult.trainer.run_folder import RunFolder

    if (folder / MANIFEST).exists():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's folder or a checkpoint's")
    found = list_checkpoints(RunFolder(folder).checkpoints) or list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder} has no whole checkpoint")
    return found
