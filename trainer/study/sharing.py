"""Stages that runs have in common are computed once: the baseline, and post-training quantization."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder, write_json

#: What a stage's result depends on, as sections of the recipe.
_INPUTS = {
    "baseline": ("model", "data", "evaluation"),
    "ptq": ("model", "data", "evaluation", "quantization", "ptq"),
}
# How blocks are visited in training has no part in either stage.
_TRAINING_ONLY = ("shuffle",)


def share_stages(run: RunFolder, recipe: Recipe, others: Iterable[tuple[RunFolder, Recipe]]) -> list[str]:
    """Give a run the stages that another run of the same study has finished.

    A run that has begun is left alone: it goes on with what is its own.

    Args:
        run: the run that is about to start.
        recipe: its recipe.
        others: runs that may have finished the same stages.

    Returns:
        Names of the stages that it was given.
    """
    if run.recipe.exists():
        return []
    given = []
    known = list(others)
    for stage in _INPUTS:
        if run.stage(stage).exists():
            continue
        for other, other_recipe in known:
            if other.stage(stage).exists() and _inputs(stage, recipe) == _inputs(stage, other_recipe):
                _copy_stage(stage, other, run)
                given.append(stage)
                break
    return given


def stage_in_work(run: RunFolder, recipe: Recipe, running: Sequence[tuple[RunFolder, Recipe]]) -> str | None:
    """The first stage that a run could be given later, because a run in progress is computing the same one.

    Args:
        run: a run that has not begun; one that has never waits.
        recipe: its recipe.
        running: runs in progress.
    """
    if run.recipe.exists():
        return None
    for stage in _INPUTS:
        for other, other_recipe in running:
            in_work = not run.stage(stage).exists() and not other.stage(stage).exists()
            if in_work and _inputs(stage, recipe) == _inputs(stage, other_recipe):
                return stage
    return None


def _inputs(stage: str, recipe: Recipe) -> dict[str, Any]:
    sections = recipe.model_dump(mode="json", include=set(_INPUTS[stage]))
    for field in _TRAINING_ONLY:
        sections["data"].pop(field)
    if stage == "baseline":
        sections["data"].pop("fraction")
    else:
        # Decides which scales are parameters, and so what the stage's tensors are.
        sections["method"] = recipe.qat.method
    return sections


def _copy_stage(stage: str, source: RunFolder, target: RunFolder) -> None:
    tensors = source.artifact(stage)
    if tensors.exists():
        building = target.artifact(stage).with_name(f".{stage}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tensors, building, copy_function=_link)
        building.rename(target.artifact(stage))
    write_json(target.stage(stage), {**source.read_stage(stage), "shared_from": source.name})


def _link(source: str, target: str) -> None:
    """Tensors of finished stages never change, so runs on one file system can share the bytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, Path(target))
