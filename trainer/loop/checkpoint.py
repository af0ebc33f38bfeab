"""Checkpoints that are whole or not there, with checksums, and the policy of which to keep."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qatapult.launch.owner import Owner
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_json

_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"


@dataclass
class TrainerState:
    """Everything about a run's progress that is not a tensor.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on, all processes together.
        curve: points of the recovery curve: tokens, step, perplexity.
        best_step: step of the best point of the curve.
        best_perplexity: its perplexity.
        evaluations_since_best: for early stopping.
        skipped_steps: steps left out because of NaN or inf.
        rollbacks: how often the run went back to a checkpoint.
        rate_factor: what rollbacks have left of the learning rate.
        peak_rates: peak learning rate of each parameter group.
        phase: index of the progressive phase.
        step_seconds: time of all steps.
        loader_seconds: what of it went by waiting for data.
    """

    step: int = 0
    tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_perplexity: float | None = None
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    rate_factor: float = 1.0
    peak_rates: list[float] = field(default_factory=list)
    phase: int | None = None
    step_seconds: float = 0.0
    loader_seconds: float = 0.0


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: TrainerState, owner: Owner | None = None
) -> None:
    """Write a checkpoint with all processes together; it appears under its name only when it is whole.

    Args:
        accelerator: holds model, optimizer and random states.
        folder: `checkpoints/step-<n>`.
        state: the rest.
        owner: the main process's right to write into the run.
    """
    if owner is not None:
        owner.check()
    building = folder.with_name(f".{folder.name}.building")
    if accelerator.is_main_process:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(building))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(building / _STATE, asdict(state))
        write_json(building / _MANIFEST, {"files": _checksums(building)})
        with owner.writing() if owner is not None else nullcontext():
            if folder.exists():
                shutil.rmtree(folder)
            building.rename(folder)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> TrainerState:
    """Load a checkpoint into the accelerator's model, optimizer and random states.

    Raises:
        UserError: if a file is missing or damaged.
    """
    verify_checkpoint(folder)
    accelerator.load_state(str(folder))
    return read_state(folder)


def read_state(folder: Path) -> TrainerState:
    """The state beside the tensors."""
    return TrainerState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted((p for p in found if (p / _MANIFEST).exists()), key=lambda path: int(path.name[5:]))


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        if not (folder / name).exists():
            raise UserError(
                f"checkpoint {folder.name}: {name} is missing; remove the checkpoint to use an older one"
            )
        if _checksum(folder / name) != expected:
            raise UserError(
                f"checkpoint {folder.name}: {name} is damaged; remove the checkpoint to use an older one"
            )


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best."""
    whole = list_checkpoints(folder)
    for path in whole[:-keep]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)


def require_disk_space(folder: Path, needed: int) -> None:
    """Refuse to start what the disk has no room for.

    Raises:
        UserError: naming the folder and both sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "free some space, keep fewer checkpoints (qat.checkpoints.keep), or choose another --runs folder"
        )


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
