"""From a study to its runs: one checked recipe for every cell and seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.study.models import model_folder
from qatapult.trainer.study.schema import Cell, Study
from qatapult.trainer.study.texts import text_file, with_own_text


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    cell: Cell
    seed: int
    recipe: Recipe

    def folder(self, runs: Path) -> RunFolder:
        return RunFolder(runs / self.recipe.name)


def study_folder(study: Study, size: str, runs: Path) -> Path:
    """Where a study keeps its recipes, the text written for it and its page."""
    return runs / f"{study.name}-{size}"


def plan_runs(study: Study, size: str, runs: Path) -> list[PlannedRun]:
    """All runs of a study: every cell with its first seed, then with the next, so that the table fills early.

    Args:
        study: the study.
        size: `small` or `full`.
        runs: folder of the runs, in which pretrained models lie.

    Raises:
        UserError: if a cell is not a sensible recipe, or the study has no such size.
    """
    chosen = study.size(size)
    pairs = [
        (number, seed, cell)
        for cell in study.chosen(size)
        for number, seed in enumerate(cell.seeds or chosen.seeds)
    ]
    planned = []
    for _, seed, cell in sorted(pairs, key=lambda pair: pair[0]):
        own = [f"name={study.name}-{size}-{cell.name}-s{seed}", f"seed={seed}"]
        if cell.model is not None:
            own.append(f"model.source={model_folder(study, size, runs, cell.model).absolute()}")
        overrides = [*study.overrides, *chosen.overrides, *cell.overrides, *own]
        recipe = load_recipe(study.recipe, overrides)
        if cell.own_text:
            file = text_file(study_folder(study, size, runs), cell)
            recipe = load_recipe(study.recipe, [*overrides, with_own_text(recipe, file)])
        planned.append(PlannedRun(cell, seed, recipe))
    return planned
