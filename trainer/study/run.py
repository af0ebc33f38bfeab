"""Run a study on this machine, one run after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe
from qatapult.trainer.run_folder import write_atomically
from qatapult.trainer.study.plan import PlannedRun, model_folder, plan_runs, study_folder
from qatapult.trainer.study.schema import Study
from qatapult.trainer.study.sharing import share_stages

#: How a run is started where nothing else is asked for.
THIS_PROCESS = (sys.executable, "-m", "qatapult.trainer")


def run_study(
    study: Study,
    size: str,
    runs: Path,
    launcher: Sequence[str] = THIS_PROCESS,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Do what is left of a study: pretrain its models, then run its cells. Finished runs are not run again.

    Args:
        study: the study.
        size: `small` or `full`.
        runs: folder of the runs.
        launcher: command that stands before `train RECIPE`, such as `accelerate launch -m qatapult.trainer`.
        say: where progress goes.

    Returns:
        Names of the runs that failed; the others were run all the same.

    Raises:
        UserError: if a cell is not a sensible recipe, before anything is run.
        KeyboardInterrupt: after an interruption; the same call goes on.
    """
    prepare_models(study, size, runs, say)
    planned = plan_runs(study, size, runs)
    failed = []
    for number, run in enumerate(planned, start=1):
        name, folder = run.recipe.name, run.folder(runs)
        where = f"[{number}/{len(planned)}] {name}"
        if folder.stage("report").exists():
            say(f"{where}: done before")
            continue
        given = share_before(run, planned, runs)
        say(f"{where}: {run.cell.label}" + (f" ({' and '.join(given)} shared)" if given else ""))
        recipe = study_folder(study, size, runs) / "recipes" / f"{name}.yaml"
        write_atomically(recipe, dump_recipe(run.recipe))
        status = subprocess.run([*launcher, "train", str(recipe), "--runs", str(runs), "--quiet"]).returncode
        if status != 0:
            say(f"{where}: failed with exit status {status}; the study goes on without it")
            failed.append(name)
    return failed


def share_before(run: PlannedRun, planned: Sequence[PlannedRun], runs: Path) -> list[str]:
    """Give a run the stages that another run of the study has finished."""
    others = [(other.folder(runs), other.recipe) for other in planned if other is not run]
    return share_stages(run.folder(runs), run.recipe, others)


def prepare_models(study: Study, size: str, runs: Path, say: Callable[[str], None]) -> None:
    """Train the study's models from scratch, those that are not there yet.

    Raises:
        UserError: if a training fails.
    """
    wanted = {cell.model for cell in study.chosen(size) if cell.model is not None}
    for name in (name for name in study.models if name in wanted):
        target = model_folder(study, size, runs, name)
        if (target / "config.json").exists():
            say(f"model {name}: trained before")
            continue
        say(f"model {name}: training from scratch")
        description = study_folder(study, size, runs) / "study.yaml.json"
        write_atomically(description, study.model_dump_json())
        command = [
            sys.executable,
            "-m",
            "qatapult.trainer.study.pretrain",
            str(description),
            size,
            name,
            str(runs),
        ]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"study {study.name}: model {name} could not be trained")
