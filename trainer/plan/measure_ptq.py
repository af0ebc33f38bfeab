"""The loss of post-training quantization of the model itself: measured first, it may be the answer."""

from __future__ import annotations

import importlib
from pathlib import Path

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder

_STAGES = ("baseline", "ptq")


def ptq_loss_of(run: Path) -> float:
    """Relative loss of perplexity by the best post-training method of a run, such as 0.03.

    Raises:
        UserError: if the run has not measured it.
    """
    folder = RunFolder(run)
    missing = [stage for stage in _STAGES if not folder.stage(stage).exists()]
    if missing:
        raise UserError(
            f"{run} has no finished stage {' or '.join(missing)}; run `qatapult train` for it first"
        )
    baseline = float(folder.read_stage("baseline")["perplexity"])
    methods = folder.read_stage("ptq")["methods"]
    return min(float(method["perplexity"]) for method in methods.values()) / baseline - 1


def measure_ptq(recipe: Recipe, runs: Path, quiet: bool) -> float:
    """Run a recipe's baseline and its post-training methods, unless its run folder has them already.

    `qatapult train` with the same recipe goes on from there.

    Returns:
        Relative loss of perplexity by the best method.

    Raises:
        UserError: as `qatapult train`.
    """
    run = runs / recipe.name
    folder = RunFolder(run)
    if not all(folder.stage(stage).exists() for stage in _STAGES):
        _run_stages(recipe, folder, quiet)
    return ptq_loss_of(run)


def _run_stages(recipe: Recipe, folder: RunFolder, quiet: bool) -> None:
    from qatapult.launch.owner import claim
    from qatapult.trainer.console import Console
    from qatapult.trainer.context import Context
    from qatapult.trainer.environment import describe_environment
    from qatapult.trainer.loop.engine import create_accelerator
    from qatapult.trainer.pipeline import check_inputs
    from qatapult.trainer.recipe.loading import dump_recipe
    from qatapult.trainer.run_folder import write_atomically, write_json
    from qatapult.trainer.tracking.trackers import Tracking

    check_inputs(recipe, folder)
    console = Console(quiet=quiet, as_json=True)
    accelerator = create_accelerator(recipe)
    owner = claim(folder)
    try:
        # A measurement is no training run: it is not logged to trackers.
        untracked = recipe.model_copy(
            update={"tracking": recipe.tracking.model_copy(update={"trackers": ()})}
        )
        context = Context(recipe, folder, accelerator, console, Tracking(accelerator, untracked, folder))
        write_atomically(folder.recipe, dump_recipe(recipe))
        write_json(folder.environment, describe_environment(accelerator, recipe.qat))
        for stage in _STAGES:
            if folder.stage(stage).exists():
                continue
            console.stage(stage)
            result = importlib.import_module(f"qatapult.trainer.stages.{stage}").run(context)
            with owner.writing():
                write_json(folder.stage(stage), result)
    finally:
        owner.release()
