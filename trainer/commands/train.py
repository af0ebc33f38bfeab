"""`qatapult train`: run a recipe, or go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, QuietOption, RecipeArgument


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json at the end.")] = False,
) -> None:
    """Run a recipe from its baseline to its report; the same command goes on where an earlier one stopped.

    Example: qatapult train smollm2-135m-w4a8 qat.tokens=100000
    """
    from qatapult.trainer.pipeline import run
    from qatapult.trainer.recipe.loading import load_recipe

    run(load_recipe(recipe, overrides or []), runs, quiet=quiet, as_json=as_json)
