"""`metrics.jsonl`: one line a step or evaluation, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext

from qatapult.launch.owner import Owner
from qatapult.trainer.run_folder import RunFolder, write_atomically
from qatapult.trainer.tracking.trackers import Tracking


class MetricsLog:
    """Writes figures on the main process, to the file and to the trackers.

    Args:
        run: the run's folder, or None on other processes and for trainings that are not the run's own.
        tracking: experiment trackers.
        full_precision: perplexity of the full-precision model, for `recovery/perplexity`.
        ptq: perplexity of round-to-nearest, likewise.
        owner: the right to write into the run; what another attempt took over is not written any more.
        evaluated: name of the held-out perplexity.
        after: steps and tokens of a stage that this one follows, in the same file.
    """

    def __init__(
        self,
        run: RunFolder | None,
        tracking: Tracking | None = None,
        full_precision: float | None = None,
        ptq: float | None = None,
        owner: Owner | None = None,
        evaluated: str = "eval/perplexity",
        after: tuple[int, int] = (0, 0),
    ) -> None:
        self._evaluated, self._after = evaluated, after
        self.owner = owner
        self._run = run
        self._tracking = tracking
        self._full_precision = full_precision
        self._ptq = ptq

    def write(self, values: Mapping[str, float], step: int, tokens: int) -> None:
        """Append a line of figures under the names of the design."""
        step, tokens = step + self._after[0], tokens + self._after[1]
        self._append({"step": step, "tokens": tokens, "time": time.time(), **values})
        if self._tracking is not None:
            self._tracking.log(values, step, tokens)

    def evaluation(self, perplexity: float, step: int, tokens: int) -> None:
        """Append a point of the recovery curve."""
        values = {self._evaluated: perplexity}
        if self._ptq is not None and self._full_precision is not None and self._ptq != self._full_precision:
            values["recovery/perplexity"] = (self._ptq - perplexity) / (self._ptq - self._full_precision)
        self.write(values, step, tokens)

    def event(self, name: str, step: int, tokens: int) -> None:
        """Append what happened besides figures: `skip`, `rollback`, …"""
        step, tokens = step + self._after[0], tokens + self._after[1]
        self._append({"step": step, "tokens": tokens, "time": time.time(), "event": name})

    def alert(self, title: str, text: str) -> None:
        """Tell the run's owner through the tracker."""
        if self._tracking is not None:
            self._tracking.alert(title, text)

    def truncate(self, step: int) -> None:
        """Forget lines beyond a step: a crash left them, and they are about to be written again."""
        if self._run is None:
            return
        kept = [line for line in self._run.read_metrics() if line["step"] <= step + self._after[0]]
        write_atomically(self._run.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def _append(self, line: Mapping[str, object]) -> None:
        if self._run is None:
            return
        self._run.metrics.parent.mkdir(parents=True, exist_ok=True)
        ours = self.owner.writing() if self.owner is not None else nullcontext()
        with ours, self._run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
