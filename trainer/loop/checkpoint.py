"""Checkpoints: when they are taken, which are kept, and how a run goes on from one on any engine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from qatapult.launch.owner import Owner
from qatapult.trainer.loop.checkpoint_writer import FORMAT, MANIFEST, CheckpointWriter, Contents, checksum
from qatapult.trainer.loop.fragments import Fragment, StoredTensors
from qatapult.trainer.loop.training_state import engine_state, random_states, set_random_states
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Checkpoints

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.json"


@dataclass
class TrainerState:
    """Everything about a run's progress that is not a tensor.

    Attributes:
        step: optimizer steps done; the position in the data follows from it.
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


class Checkpointer:
    """Saves and loads a training's checkpoints. All processes call its methods together.

    Args:
        accelerator: the engine.
        model: inside the engine's wrappers.
        optimizer: as the accelerator prepared it.
        folder: of the checkpoints, `step-<n>` each.
        policy: which are kept, and how they are written.
        owner: the main process's right to write into the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        folder: Path,
        policy: Checkpoints,
        owner: Owner | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._engine = engine_state(accelerator, model, optimizer)
        self._folder = folder
        self._policy = policy
        asynchronous = policy.asynchronous
        if asynchronous == "auto":
            asynchronous = accelerator.device.type != "cpu"
        self._writer = CheckpointWriter(accelerator, asynchronous, owner)

    def save(self, state: TrainerState) -> None:
        """Write a checkpoint, or begin to write it in a thread.

        Raises:
            UserError: if a disk is full, naming the process; earlier checkpoints are untouched.
        """
        rank = self._accelerator.process_index
        texts: dict[str, Any] = {f"random-{rank}.json": random_states()}
        if self._accelerator.is_main_process:
            scaler = self._accelerator.scaler
            texts[_STATE] = asdict(state)
            texts[_OPTIMIZER] = {
                "steps": self._engine.steps(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
        tensors = {
            f"weights-{rank}.safetensors": _shares(self._engine.weights()),
            f"optimizer-{rank}.safetensors": _shares(self._engine.moments()),
        }
        about = {
            "step": state.step,
            "tokens": state.tokens,
            "engine": self._accelerator.distributed_type.value,
        }
        best = state.best_step
        self._writer.write(
            self._folder / f"step-{state.step}",
            Contents(tensors, texts, about),
            lambda: prune_checkpoints(self._folder, self._policy.keep, best),
        )

    def finish(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            UserError: if it could not be written.
        """
        self._writer.finish()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, as the main process sees the folder."""
        self.finish()
        whole = list_checkpoints(self._folder)
        return broadcast_object_list([whole[-1] if whole else None])[0]

    def clean(self) -> None:
        """Remove what attempts that died left half-written."""
        if self._accelerator.is_main_process and self._folder.is_dir():
            for path in self._folder.glob(".step-*.building"):
                shutil.rmtree(path, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def load(self, folder: Path) -> TrainerState:
        """Put weights, optimizer and random states into this engine, whichever engine wrote them.

        Raises:
            UserError: if a file is missing or damaged, or the checkpoint is another model's.
        """
        self._verify(folder)
        self._load_weights(folder)
        stored = stored_tensors(folder, "optimizer")
        self._engine.create_moments(set(stored.shapes))
        moments = self._engine.moments()
        _require_names(folder, {name.rpartition("/")[0] for name in stored.shapes}, self._names())
        for fragment in moments:
            if fragment.name in stored.shapes:
                stored.read_into(fragment)
        about = json.loads((folder / _OPTIMIZER).read_text(encoding="utf-8"))
        self._engine.set_steps(about["steps"])
        if self._accelerator.scaler is not None and about["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(about["scaler"])
        random_file = folder / f"random-{self._accelerator.process_index}.json"
        if random_file.exists():  # with more processes than before, the new ones keep their own
            set_random_states(json.loads(random_file.read_text(encoding="utf-8")))
        self._accelerator.wait_for_everyone()
        return read_state(folder)

    def load_weights(self, folder: Path) -> None:
        """Put the weights alone into this engine.

        Raises:
            UserError: if a file is missing or damaged, or the checkpoint is another model's.
        """
        self._verify(folder)
        self._load_weights(folder)
        self._accelerator.wait_for_everyone()

    def _load_weights(self, folder: Path) -> None:
        stored = stored_tensors(folder, "weights")
        for fragment in self._engine.weights():
            stored.read_into(fragment)
        self._engine.settle()

    def _names(self) -> set[str]:
        """Names of all weights that any process holds."""
        own = [fragment.name for fragment in self._engine.weights()]
        return set(gather_object(own))

    def _verify(self, folder: Path) -> None:
        """Each process reads its share of the files; all learn of a fault."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        try:
            verify_checkpoint(folder, rank, processes)
            fault = None
        except UserError as error:
            fault = str(error)
        faults = [text for text in gather_object([fault]) if text is not None]
        if faults:
            raise UserError(faults[0])


def _shares(fragments: Sequence[Fragment]) -> list[Fragment]:
    own = (fragment.share() for fragment in fragments)
    return [fragment for fragment in own if fragment.values.numel()]


def _require_names(folder: Path, stored: set[str], present: set[str]) -> None:
    """Refuse moments of parameters that this model does not have."""
    if unknown := sorted(stored - present):
        raise UserError(
            f"checkpoint {folder.name} has an optimizer state of {unknown[0]}, which this model does not have: "
            "it belongs to another model or recipe"
        )


def stored_tensors(folder: Path, kind: str) -> StoredTensors:
    """The tensors of a checkpoint.

    Args:
        folder: `checkpoints/step-<n>`.
        kind: `weights` (parameters and buffers) or `optimizer` (moments, named `<parameter>/<entry>`).
    """
    return StoredTensors(sorted(folder.glob(f"{kind}-*.safetensors")))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Whole weights, learned scales and buffers of a checkpoint, in main memory, by name.

    Raises:
        UserError: if a part is missing.
    """
    stored = stored_tensors(folder, "weights")
    return {name: stored.whole(name) for name in stored.shapes}


def read_state(folder: Path) -> TrainerState:
    """The state beside the tensors."""
    return TrainerState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of itself: format, step, tokens, engine, processes, and the files' checksums.

    Raises:
        UserError: if an earlier version wrote it.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {folder.name} has the format of another version of qatapult; "
            "go on with that version, or remove the checkpoint to begin again"
        )
    return manifest


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted((p for p in found if (p / MANIFEST).exists()), key=lambda path: int(path.name[5:]))


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Name, step, tokens, perplexity (None where none was measured), best or not, bytes, engine and processes."""
    manifest, state = read_manifest(folder), read_state(folder)
    measured = {int(point["step"]): point["perplexity"] for point in state.curve}
    newest = read_state(list_checkpoints(folder.parent)[-1])
    return {
        "name": folder.name,
        **{key: manifest[key] for key in ("step", "tokens", "engine", "processes")},
        "perplexity": measured.get(state.step),
        "best": state.step == newest.best_step,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def verify_checkpoint(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare files with their checksums.

    Args:
        folder: `checkpoints/step-<n>`.
        part: which share of the files to read.
        parts: of how many.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    for name, expected in list(read_manifest(folder)["files"].items())[part::parts]:
        if not (folder / name).exists():
            raise UserError(
                f"checkpoint {folder.name}: {name} is missing; remove the checkpoint to use an older one"
            )
        if checksum(folder / name) != expected:
            raise UserError(
                f"checkpoint {folder.name}: {name} is damaged; remove the checkpoint to use an older one"
            )


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best."""
    whole = list_checkpoints(folder)
    for path in whole[:-keep]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)
