"""`qatapult study`: a grid of runs that answers one question, and its page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.recipe.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("study")(study)


def study(
    name: Annotated[str | None, typer.Argument(help="A study's file, or the name of a shipped one.")] = None,
    size: Annotated[
        str, typer.Option(help="`small` (minutes on two cores) or `full` (a GPU node).")
    ] = "small",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    page: Annotated[
        Path | None, typer.Option(help="Folder for the page; by default the study's own in the runs' folder.")
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help='Start each run by a command, such as "accelerate launch -m qatapult.trainer".'),
    ] = None,
    submit: Annotated[
        str | None, typer.Option(help="Cluster profile: send all runs as one Slurm job array instead.")
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time: here 1 by default, each with a process of its own and the GPUs dealt out to "
            "them; with --submit 4.",
        ),
    ] = None,
    only_page: Annotated[bool, typer.Option("--only-page", help="Run nothing; write the page anew.")] = False,
    show_plan: Annotated[bool, typer.Option("--plan", help="List the runs and start nothing.")] = False,
) -> None:
    """Run a study and write its page; the same command goes on where an earlier one stopped.

    Without a name it lists the shipped studies.

    Example: qatapult study bits --size small
    """
    from qatapult.trainer.study.schema import load_study, shipped_studies

    if name is None:
        for shipped in shipped_studies():
            typer.echo(f"{shipped:12} {load_study(shipped).question}")
        return
    from qatapult.trainer.study.plan import plan_runs, study_folder

    described = load_study(name)
    planned = plan_runs(described, size, runs)
    if show_plan:
        for run in planned:
            typer.echo(f"{run.recipe.name:40} {run.cell.label}")
        return
    if submit is not None:
        _submit(name, size, runs, submit, at_once or 4)
        return
    if launcher and (at_once or 1) > 1:
        raise UserError("--at-once goes with no --launcher: a launched run takes all GPUs")
    failed: list[str] = []
    if not only_page:
        from qatapult.trainer.study.run import run_study

        words = shlex.split(launcher or "")
        failed = run_study(described, size, runs, words, typer.echo, at_once or 1)
    from qatapult.trainer.study.page import write_page
    from qatapult.trainer.study.results import collect

    command = f"qatapult study {name} --size {size}"
    target = page or study_folder(described, size, runs)
    typer.echo(f"page: {write_page(described, size, collect(planned, runs), target, command)}")
    if failed:
        raise UserError(f"study {described.name}: {len(failed)} runs failed: {', '.join(failed)}")


def _submit(name: str, size: str, runs: Path, profile: str, at_once: int) -> None:
    from qatapult.launch.submit import Target, submit_sweep
    from qatapult.trainer.study.plan import plan_runs
    from qatapult.trainer.study.run import prepare_inputs, share_before
    from qatapult.trainer.study.schema import load_study

    described = load_study(name)
    planned = plan_runs(described, size, runs)
    prepare_inputs(described, size, runs, planned, typer.echo)
    left = [run for run in planned if not run.folder(runs).stage("report").exists()]
    if not left:
        raise UserError(f"study {described.name}: all runs are finished; --only-page writes the page")
    for run in left:
        share_before(run, planned, runs)
    sent = submit_sweep(
        f"{described.name}-{size}", [run.recipe for run in left], runs, Target(profile), at_once
    )
    typer.echo(f"{len(sent)} runs sent; when they are done: qatapult study {name} --size {size} --only-page")
