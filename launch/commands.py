"""`qatapult submit | runs | status | logs | cancel | resume | doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from qatapult.trainer.commands.recipe import OverridesArgument
from qatapult.trainer.recipe.errors import UserError

RunsOption = Annotated[Path, typer.Option(help="Folder of the runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
NameArgument = Annotated[str, typer.Argument(help="A run's name or folder.", metavar="RUN")]


def register(app: typer.Typer) -> None:
    for command in (submit,):
        app.command()(command)


def submit(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a shipped recipe.")
    ] = None,
    overrides: OverridesArgument = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Submit every run of a sweep file as one job array.")
    ] = None,
    profile: Annotated[str, typer.Option(help="Cluster profile: a name or a file.")] = "default",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the profile, such as partition=debug."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    engine: Annotated[str | None, typer.Option(help="`ddp`, a shipped Accelerate config, or a file.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Runs of a sweep, or local ones, at a time.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, from a queue, without Slurm.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --local: processes of a run.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Send a run to a Slurm cluster, or to this machine's queue; it resumes until its report is written.

    Example: qatapult submit llama-2-7b-w4a8 --profile a100-8 --nodes 4 qat.tokens=10000000
    """
    from qatapult.launch import submit as submitting
    from qatapult.launch import sweep as sweeps
    from qatapult.trainer.recipe.loading import load_recipe

    if (recipe is None) == (sweep is None):
        # With --sweep, the first word is an override of every run.
        if sweep is None or recipe is None or "=" not in recipe:
            raise UserError("name a recipe, or a sweep with --sweep, and not both")
        overrides, recipe = [recipe, *(overrides or [])], None
    target = submitting.Target(profile, tuple(changes or ()), nodes, engine)
    if sweep is not None:
        description = sweeps.load_sweep(sweep)
        recipes = sweeps.recipes(description, sweep, tuple(overrides or ()))
        cap = at_once or description.at_once
        if dry_run:
            typer.echo(submitting.sweep_script(description.name, recipes, runs, target, cap), nl=False)
            return
        submissions = submitting.submit_sweep(description.name, recipes, runs, target, cap)
    else:
        assert recipe is not None
        recipes = [load_recipe(recipe, overrides or [])]
        if dry_run:
            typer.echo(submitting.script_for(recipes[0], runs, target), nl=False)
            return
        submissions = [submitting.submit_run(recipes[0], runs, target)]
    for one, submission in zip(recipes, submissions, strict=True):
        typer.echo(f"{one.name}: job {submission.job}")
