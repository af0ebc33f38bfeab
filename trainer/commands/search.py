"""`qatapult search`: which layers keep more bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, QuietOption, RecipeArgument


def register(app: typer.Typer) -> None:
    app.command("search")(search)


def search(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="average_bits=4.25 (scales included), size_gb=0.1, w8_fraction=0.05 or "
            "tokens_per_second=50; may be given several times."
        ),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Grids beside the recipe's own, such as 2,3,8 or 4:g32,8.")
    ] = "8",
    blocks: Annotated[int, typer.Option(help="Calibration blocks.")] = 8,
    block_size: Annotated[int, typer.Option(help="Tokens a calibration block.")] = 128,
    measures: Annotated[
        str,
        typer.Option(
            help="Estimates beside the measured divergence: fisher, hessian, and learned (bits trained by "
            "gradient descent with a penalty for exceeding the budget)."
        ),
    ] = "fisher,hessian",
    trials: Annotated[int, typer.Option(help="Whole assignments that the refinement tries.")] = 96,
    seconds: Annotated[float, typer.Option(help="Time limit; what matters most is measured first.")] = 600.0,
    fused: Annotated[
        bool, typer.Option(help="q/k/v, and gate/up, share a grid, because they are served as one kernel.")
    ] = True,
    latency: Annotated[
        Path | None, typer.Option(help="JSON table of milliseconds by layer shape, for tokens_per_second.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where results and measurements go; searches/<recipe> by default.")
    ] = None,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decide the bits of every layer within a budget; the same command goes on where an earlier one stopped.

    Example: qatapult search smollm2-135m-w4a8 --budget w8_fraction=0.05
    """
    from rich.console import Console as RichConsole

    from qatapult.trainer.console import Console
    from qatapult.trainer.recipe.loading import load_recipe
    from qatapult.trainer.search.run import SearchSettings
    from qatapult.trainer.search.run import search as run_search
    from qatapult.trainer.search.show import print_result, result_json, write_result

    loaded = load_recipe(recipe, overrides or [])
    settings = SearchSettings(
        budgets=tuple(budget or ()),
        candidates=tuple(text for text in candidates.split(",") if text.strip()),
        blocks=blocks,
        block_size=block_size,
        measures=tuple(text.strip() for text in measures.split(",") if text.strip()),
        trials=trials,
        seconds=seconds,
        fused=fused,
        latency=latency,
    )
    target = folder or Path("searches") / loaded.name
    result = run_search(loaded, settings, target, Console(quiet=quiet, as_json=as_json))
    write_result(result, loaded, target)
    if as_json:
        typer.echo(json.dumps(result_json(result), indent=2))
    else:
        console = RichConsole()
        print_result(result, console if console.is_terminal else RichConsole(width=150), target)
