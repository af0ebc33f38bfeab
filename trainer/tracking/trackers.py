"""Experiment tracking: Accelerate's trackers, fed with the names and the axis of `metrics.jsonl`.

Tracking is never allowed to harm training: without a key wandb runs offline, a network that fails makes it go
offline, and a tracker that raises is dropped with one warning, because `metrics.jsonl` has everything anyway.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import RunFolder, write_json
from qatapult.trainer.tracking import wandb_run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from qatapult.trainer.recipe.schema import Recipe


class Tracking:
    """The trackers of a run; does nothing on other processes than the main one or without trackers.

    Args:
        accelerator: its trackers are set up here, so it need not be built with `log_with`.
        recipe: names the trackers, the project, group and tags.
        run_folder: keeps the tracker's run id, so that a resumed run goes on in the same wandb run.
        job_type: wandb's job type; by default `trial` for the runs of a group (a sweep), else `train`.

    Raises:
        UserError: if the recipe asks for a tracker that is not installed.
    """

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, run_folder: RunFolder, job_type: str | None = None
    ) -> None:
        self._recipe, self._run = recipe, run_folder
        self._trackers: dict[str, GeneralTracker] = {}
        self._all = accelerator.trackers
        kind = job_type or ("trial" if recipe.tracking.group else "train")
        if not accelerator.is_main_process:
            return
        for name in recipe.tracking.trackers:
            tracker = self._start(name, kind)
            if tracker is not None:
                self._trackers[name] = tracker
                self._all.append(tracker)

    def log(self, values: Mapping[str, float], step: int, tokens: int) -> None:
        """Log figures under the names of `metrics.jsonl`.

        Args:
            values: such as `{"train/loss": 0.5}`.
            step: the optimizer step.
            tokens: tokens trained on so far, all processes together: the x axis.
        """
        for name in list(self._trackers):
            if name == "wandb":
                # No step: wandb refuses to go back, and a rollback or a resume does. The axis is `tokens`.
                self._guard(name, "log", {"tokens": tokens, "step": step, **values})
            else:
                self._guard(name, "log", dict(values), step=tokens)

    def alert(self, title: str, text: str) -> None:
        """Tell the owner of the run: a rollback, a stop. Only wandb has alerts."""
        if "wandb" in self._trackers:
            self._guard("wandb", "alert", title, text)

    def finish(self, report: Mapping[str, Any] | None = None) -> None:
        """Store recipe and report (and, if asked, the exported checkpoint), send the last alert, and close.

        Args:
            report: content of `report.json`, if the run came that far.
        """
        for name in list(self._trackers):
            if name == "wandb":
                self._guard(name, "finish_run", self._run, self._recipe.tracking.upload_checkpoint, report)
            self._guard(name, "finish")
            self._forget(name)

    def _start(self, name: str, job_type: str) -> GeneralTracker | None:
        try:
            tracker = self._build(name, job_type)
        except ImportError:
            raise UserError(
                f"tracking.trackers: '{name}' is not installed: pip install 'qatapult[{name}]'"
            ) from None
        try:
            tracker.start()
        except Exception as error:
            _give_up(name, error)
            return None
        return tracker

    def _build(self, name: str, job_type: str) -> GeneralTracker:
        if name == "wandb":
            return wandb_run.build_tracker(self._recipe, self._run, run_id(self._run), job_type)
        import tensorboard  # noqa: F401  (raises ImportError before Accelerate would raise something longer)
        from accelerate.tracking import TensorBoardTracker

        return TensorBoardTracker("tensorboard", self._run.logs)

    def _guard(self, name: str, method: str, *arguments: Any, **keywords: Any) -> None:
        try:
            getattr(self._trackers[name], method)(*arguments, **keywords)
        except Exception as error:
            _give_up(name, error)
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Leave a tracker alone from now on; Accelerate would close it once more at the end of training."""
        tracker = self._trackers.pop(name, None)
        if tracker in self._all:
            self._all.remove(tracker)


def run_id(run: RunFolder) -> str:
    """The tracker's id of this run: made up once and kept in the run folder."""
    file = id_file(run)
    if not file.exists():
        write_json(file, {"run_id": secrets.token_hex(4)})
    return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])


def id_file(run: RunFolder) -> Path:
    return run.path / "tracking.json"


def _give_up(name: str, error: Exception) -> None:
    """A broken tracker must not stop a run of days: say so once and go on without it."""
    reason = " ".join(str(error).split())[:200]
    warnings.warn(
        f"{name} failed ({type(error).__name__}: {reason}); going on without it, metrics.jsonl has all",
        RuntimeWarning,
        stacklevel=3,
    )
