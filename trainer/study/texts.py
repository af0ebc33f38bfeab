"""Text that the full-precision model writes before a study's runs: more data where there is no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_atomically
from qatapult.trainer.study.schema import Cell, Writing


def text_file(folder: Path, cell: Cell) -> Path:
    """Where a cell's own text is kept, inside the study's folder."""
    return folder / "texts" / f"{cell.name}.jsonl"


def with_own_text(recipe: Recipe, file: Path) -> str:
    """The override that adds a file of written text to a recipe's training data, as much as there is of each."""
    sources = [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.data.train]
    return f"data.train={json.dumps([*sources, {'kind': 'jsonl', 'path': str(file.absolute())}])}"


def write_text(recipe: Recipe, writing: Writing, file: Path, say: Callable[[str], None]) -> None:
    """Let a recipe's full-precision model write text, by `qatapult teacher write`; a whole file is kept.

    Raises:
        UserError: if it fails.
    """
    if file.exists() and len(file.read_text(encoding="utf-8").splitlines()) >= writing.documents:
        say(f"{file.name}: written before")
        return
    say(f"{file.name}: {recipe.model.source} writes {writing.documents} documents")
    description = file.with_suffix(".yaml")
    write_atomically(description, dump_recipe(recipe))
    command = [sys.executable, "-m", "qatapult.trainer.cli", "teacher", "write", str(description)]
    options = {"out": file, "documents": writing.documents, "tokens": writing.tokens, "batch-size": 64}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"{file.name}: the full-precision model could not write it")
