"""`qatapult submit | runs | status | logs | cancel | resume | doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qatapult.trainer.commands.recipe import OverridesArgument
from qatapult.trainer.recipe.errors import UserError

RunsOption = Annotated[Path, typer.Option(help="Folder of the runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
NameArgument = Annotated[str, typer.Argument(help="A run's name or folder.", metavar="RUN")]


def register(app: typer.Typer) -> None:
    for command in (submit, runs_table, status, logs, cancel, resume, doctor):
        app.command("runs" if command is runs_table else None)(command)


def submit(
    recipe: Annotated[str | None, typer.Argument(help="A YAML file, or a shipped recipe's name.")] = None,
    overrides: OverridesArgument = None,
    sweep: Annotated[Path | None, typer.Option(help="A sweep file: all its runs as one job array.")] = None,
    profile: Annotated[str, typer.Option(help="Cluster profile: a name or a file.")] = "default",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a profile's field, such as partition=debug.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    engine: Annotated[str | None, typer.Option(help="`ddp`, a shipped Accelerate config, or a file.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Runs at a time: of a sweep, or local.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, from a queue.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --local: processes of a run.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Send a run to a Slurm cluster, or to this machine's queue; it resumes until its report is written.

    Example: qatapult submit llama-2-7b-w4a8 --profile a100-8 --nodes 4 qat.tokens=10000000
    """
    from qatapult.launch import submit as submitting
    from qatapult.launch.local import submit_local
    from qatapult.launch.sweep import load_sweep
    from qatapult.launch.sweep import recipes as sweep_recipes
    from qatapult.trainer.recipe.loading import load_recipe

    changed = list(overrides or [])
    if sweep is not None:
        # The first word is not a recipe then, but an override of every run.
        changed = [*([recipe] if recipe else []), *changed]
        described = load_sweep(sweep)
        recipes = sweep_recipes(described, sweep, tuple(changed))
        cap, name = at_once or described.at_once, described.name
    elif recipe is None:
        raise UserError(
            "name a recipe (`qatapult recipe list` shows those that are shipped) or a --sweep file"
        )
    else:
        recipes, cap, name = [load_recipe(recipe, changed)], at_once or 1, None

    if local:
        if dry_run:
            raise UserError("--dry-run prints a cluster's script; --local has none")
        submissions = [submit_local(each, runs, processes, cap, engine) for each in recipes]
    else:
        target = submitting.Target(profile, tuple(changes or ()), nodes, engine)
        if dry_run:
            text = (
                submitting.script_for(recipes[0], runs, target)
                if name is None
                else submitting.sweep_script(name, recipes, runs, target, cap)
            )
            typer.echo(text, nl=False)
            return
        if name is None:
            submissions = [submitting.submit_run(recipes[0], runs, target)]
        else:
            submissions = submitting.submit_sweep(name, recipes, runs, target, cap)
    names = [each.name for each in recipes]
    if as_json:
        pairs = zip(names, submissions, strict=True)
        _print_json([{"name": run, "where": sent.where, "job": sent.job} for run, sent in pairs])
        return
    for run, sent in zip(names, submissions, strict=True):
        typer.echo(f"{run}: " + (f"job {sent.job}" if sent.where == "slurm" else "queued on this machine"))


def runs_table(runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """Table of all runs: state, step, loss, recovery, tokens/s, time left, job.

    Example: qatapult runs --runs /scratch/me/runs
    """
    from qatapult.launch.folder import all_runs
    from qatapult.launch.show import table
    from qatapult.launch.state import describe

    states = describe(list(all_runs(runs)))
    if as_json:
        _print_json([state.as_json() for state in states])
    elif not states:
        typer.echo(f"no runs in {runs}; start one with: qatapult submit RECIPE")
    else:
        table(states)


def status(run: NameArgument, runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """One run in full: its stages, its attempts and how each ended, and where its files are.

    Example: qatapult status llama-2-7b-w4a8
    """
    from qatapult.launch.folder import find_run
    from qatapult.launch.show import details
    from qatapult.launch.state import describe

    launch = find_run(run, runs)
    [state] = describe([launch])
    if as_json:
        _print_json({**state.as_json(), "history": launch.read_attempts()})
    else:
        details(launch, state)


def logs(
    run: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="One rank's; default: the job's and rank 0's.")
    ] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """What a run's job and ranks print.

    Example: qatapult logs llama-2-7b-w4a8 -f --rank 3
    """
    from qatapult.launch import logs as log_files
    from qatapult.launch.folder import find_run
    from qatapult.launch.state import LIVE, describe

    launch = find_run(run, runs)
    files = log_files.log_files(launch, rank)
    if follow:
        lines = log_files.follow(files, lambda: describe([launch])[0].state in LIVE)
    else:
        lines = log_files.read(files)
    for line in lines:
        typer.echo(line)


def cancel(run: NameArgument, runs: RunsOption = Path("runs")) -> None:
    """Stop a run, with a checkpoint if its ranks are quick enough; `qatapult resume` takes it up again.

    Example: qatapult cancel llama-2-7b-w4a8
    """
    from qatapult.launch import control
    from qatapult.launch.folder import find_run

    typer.echo(control.cancel(find_run(run, runs)))


def resume(
    run: Annotated[
        str | None, typer.Argument(help="A run's name or folder; none: this machine's queue.")
    ] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Send a run off again that stopped, failed or was cancelled, as it was submitted.

    Without a name, go on with this machine's queue after a restart.

    Example: qatapult resume llama-2-7b-w4a8
    """
    from qatapult.launch import control
    from qatapult.launch.folder import find_run

    if run is not None:
        typer.echo(control.resume(find_run(run, runs)))
        return
    waiting = control.restart_queue(runs)
    typer.echo(f"this machine goes on with {', '.join(waiting)}" if waiting else "nothing is queued here")


def doctor(
    ranks: Annotated[int, typer.Option(min=0, help="Also check that so many ranks here talk.")] = 0,
    runs: RunsOption = Path("runs"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what takes no time: for health checks.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: versions, GPUs, NCCL, Triton, DeepSpeed, Slurm, disk, network; say what to do.

    Example: qatapult doctor --ranks 8
    """
    from qatapult.launch.doctor import FAIL, examine
    from qatapult.launch.show import findings

    found = examine(runs, ranks=ranks, quick=quick)
    if as_json:
        _print_json([finding.as_json() for finding in found])
    else:
        findings(found)
    if any(finding.level == FAIL for finding in found):
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
