"""`qatapult advise`: is training worth it?"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, RecipeArgument


def register(app: typer.Typer) -> None:
    app.command("advise")(advise)


def advise(
    recipe: RecipeArgument = "smollm2-135m-w4a8",
    overrides: OverridesArgument = None,
    scenario: Annotated[
        str, typer.Option(help="Where it is served: cloud, edge, mobile or research.")
    ] = "cloud",
    tolerance: Annotated[
        float, typer.Option(help="Acceptable relative loss of perplexity, such as 0.02.")
    ] = 0.02,
    measure: Annotated[
        bool,
        typer.Option(
            help="Measure the model's own PTQ first, in the run folder that `train` goes on with; "
            "otherwise typical figures are used."
        ),
    ] = True,
    ptq_loss: Annotated[float | None, typer.Option(help="That loss, if you know it already.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are evidence.")] = Path(
        "runs"
    ),
    study: Annotated[Path, typer.Option(help="Folder of measured studies.")] = Path("docs/study"),
    node: Annotated[str, typer.Option(help="GPUs to train on, as in `qatapult plan`.")] = "8xA100-80GB",
    nodes: Annotated[int, typer.Option(help="Number of such nodes.")] = 1,
    price: Annotated[float | None, typer.Option(help="US dollars a GPU-hour.")] = None,
    training_days: Annotated[
        float | None, typer.Option(help="Days of training on these GPUs; planned from the recipe if absent.")
    ] = None,
    serving_cost: Annotated[
        float | None, typer.Option(help="US dollars a year for serving the full-precision model.")
    ] = None,
    tokens_per_day: Annotated[
        float | None, typer.Option(help="Tokens served a day, with --price-per-million.")
    ] = None,
    price_per_million: Annotated[
        float | None, typer.Option(help="US dollars that a million served tokens cost you.")
    ] = None,
    saving: Annotated[
        float | None, typer.Option(help="Share of the serving cost that the lower precision saves.")
    ] = None,
    start: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day of training.")
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Only print the decision matrix.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of costs and savings over time.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether to train: expected quality, cost, savings, and the day on which it has paid for itself.

    Example: qatapult advise smollm2-135m-w4a8 --scenario cloud --serving-cost 100000
    """
    from rich.console import Console

    from qatapult.trainer.plan.advice import advise as judge
    from qatapult.trainer.plan.advice import situation_of
    from qatapult.trainer.plan.evidence import measured, published
    from qatapult.trainer.plan.hardware import parse_cluster
    from qatapult.trainer.plan.measure_ptq import measure_ptq
    from qatapult.trainer.plan.show_advice import matrix_table, plot_advice, print_advice
    from qatapult.trainer.recipe.loading import load_recipe

    console = Console(width=None if Console().is_terminal else 150)
    if matrix:
        console.print(matrix_table())
        return
    loaded = load_recipe(recipe, overrides or [])
    situation = situation_of(
        loaded,
        parse_cluster(node, nodes, price),
        scenario=scenario,
        tolerance=tolerance,
        training_days=training_days,
        serving_cost=serving_cost,
        tokens_per_day=tokens_per_day,
        price_per_million=price_per_million,
        saving=saving,
        start=(start or datetime.now()).date(),
        ptq_loss=ptq_loss,
    )
    if ptq_loss is None and measure:
        situation = situation.with_ptq_loss(measure_ptq(loaded, runs, quiet))
    evidence = [*measured([folder for folder in (runs, study) if folder.is_dir()]), *published()]
    advice = judge(situation, evidence)
    if as_json:
        typer.echo(json.dumps(advice.as_json(), indent=2))
    else:
        print_advice(advice, console)
    if plot is not None:
        plot_advice(advice, plot)
