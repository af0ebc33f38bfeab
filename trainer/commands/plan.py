"""`qatapult plan`: what a recipe needs on a cluster, before anything is rented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, RecipeArgument


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    node: Annotated[
        str, typer.Option(help="GPUs of a node, such as 8xA100-80GB, or 2xCPU for this machine.")
    ] = "8xA100-80GB",
    nodes: Annotated[int, typer.Option(help="Number of such nodes.")] = 1,
    price: Annotated[
        float | None, typer.Option(help="US dollars a GPU-hour; a default is used and marked.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Only this engine: single, ddp, zero1, zero2, zero3 or fsdp2.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the Accelerate config of the recommended setting to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of the memory by part (PNG, SVG or PDF).")
    ] = None,
    calibrate: Annotated[
        int, typer.Option(help="Measure so many real steps on this machine and refine the plan with them.")
    ] = 0,
    everything: Annotated[
        bool, typer.Option("--all", help="List every setting, not the best of each engine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory a rank by part, time and cost of a recipe for every engine, and the cheapest setting that fits.

    Example: qatapult plan smollm2-135m-w4a8 model.source=random:llama-2-7b --node 8xA100-80GB
    """
    from rich.console import Console

    from qatapult.trainer.plan.accelerate_config import write_accelerate_config
    from qatapult.trainer.plan.hardware import parse_cluster
    from qatapult.trainer.plan.planner import make_plan, only_engine, require_fit
    from qatapult.trainer.plan.show import plan_json, plot_plan, print_plan
    from qatapult.trainer.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    cluster = parse_cluster(node, nodes, price)
    calibration = None
    if calibrate:
        from qatapult.trainer.plan.calibrate import calibrate as measure

        calibration = measure(loaded, cluster, calibrate)
    made = make_plan(
        loaded,
        cluster,
        calibration.assumptions if calibration else None,
        calibration.speed if calibration else None,
    )
    if engine is not None:
        made = only_engine(made, engine)
    if as_json:
        typer.echo(json.dumps(plan_json(made, everything), indent=2))
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=190)
        print_plan(made, console, everything)
        if calibration:
            console.print(calibration.describe(), highlight=False)
    if plot is not None:
        plot_plan(made, plot)
    best = require_fit(made)
    if write is not None:
        write_accelerate_config(write, loaded, cluster, best.setting)
