"""Run a study on this machine, one run after the other or several at a time."""

from __future__ import annotations

import gc
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_atomically
from qatapult.trainer.study.models import model_folder
from qatapult.trainer.study.plan import PlannedRun, plan_runs, study_folder
from qatapult.trainer.study.schema import Study
from qatapult.trainer.study.sharing import share_stages
from qatapult.trainer.study.side_by_side import SideBySide
from qatapult.trainer.study.texts import text_file, write_text


def run_study(
    study: Study,
    size: str,
    runs: Path,
    launcher: Sequence[str] = (),
    say: Callable[[str], None] = print,
    at_once: int = 1,
) -> list[str]:
    """Do what is left of a study: pretrain its models, then run its cells. Finished runs are not run again.

    Args:
        study: the study.
        size: `small` or `full`.
        runs: folder of the runs.
        launcher: command that stands before a recipe's file, such as `accelerate launch -m qatapult.trainer`;
            without one, all runs are computed by this process.
        say: where progress goes.
        at_once: runs at the same time, each in a process of its own; more than one goes with no launcher, which
            takes all GPUs for a run.

    Returns:
        Names of the runs that failed; the others were run all the same.

    Raises:
        UserError: if a cell is not a sensible recipe, before anything is run.
        SystemExit: after an interruption; the same call goes on.
    """
    planned = plan_runs(study, size, runs)
    prepare_inputs(study, size, runs, planned, say)
    recipes = study_folder(study, size, runs) / "recipes"
    left = []
    for run in planned:
        if run.folder(runs).stage("report").exists():
            say(f"{run.recipe.name}: done before")
            continue
        write_atomically(recipes / f"{run.recipe.name}.yaml", dump_recipe(run.recipe))
        left.append(run)

    def share(run: PlannedRun) -> list[str]:
        return share_before(run, planned, runs)

    if at_once > 1:
        return SideBySide(runs, recipes, at_once, share, say).execute(left)
    return _one_by_one(left, runs, recipes, launcher, share, say)


def _one_by_one(
    left: Sequence[PlannedRun],
    runs: Path,
    recipes: Path,
    launcher: Sequence[str],
    share: Callable[[PlannedRun], list[str]],
    say: Callable[[str], None],
) -> list[str]:
    failed = []
    for number, run in enumerate(left, start=1):
        name, given = run.recipe.name, share(run)
        where = f"[{number}/{len(left)}] {name}"
        say(f"{where}: {run.cell.label}" + (f" ({' and '.join(given)} shared)" if given else ""))
        recipe = recipes / f"{name}.yaml"
        why = _run_elsewhere(launcher, recipe, runs) if launcher else _run_here(run.recipe, runs)
        if why:
            say(f"{where}: {why}; the study goes on without it")
            failed.append(name)
    return failed


def _run_elsewhere(launcher: Sequence[str], recipe: Path, runs: Path) -> str:
    """Run a recipe by a command; why it failed, or nothing."""
    status = subprocess.run([*launcher, str(recipe), "--runs", str(runs), "--quiet"]).returncode
    return f"failed with exit status {status}" if status else ""


def _run_here(recipe: Recipe, runs: Path) -> str:
    """Run a recipe in this process, which saves the start of a new one; why it failed, or nothing."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from qatapult.trainer import pipeline

    # Accelerate keeps one set of settings a process, and the next run's may differ.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        pipeline.run(recipe, runs, quiet=True, plots=False)
    except UserError as error:
        return f"failed: {error}"
    except Exception:
        traceback.print_exc()
        return "failed"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""


def share_before(run: PlannedRun, planned: Sequence[PlannedRun], runs: Path) -> list[str]:
    """Give a run the stages that another run of the study has finished."""
    others = [(other.folder(runs), other.recipe) for other in planned if other is not run]
    return share_stages(run.folder(runs), run.recipe, others)


def prepare_inputs(
    study: Study, size: str, runs: Path, planned: Sequence[PlannedRun], say: Callable[[str], None]
) -> None:
    """What the runs need before any of them starts: models trained from scratch, text written by them.

    Raises:
        UserError: if a training or a writing fails.
    """
    prepare_models(study, size, runs, say)
    writing = study.size(size).writing
    for cell, recipe in {run.cell.name: (run.cell, run.recipe) for run in planned}.values():
        if cell.own_text and writing is not None:
            write_text(recipe, writing, text_file(study_folder(study, size, runs), cell), say)


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
