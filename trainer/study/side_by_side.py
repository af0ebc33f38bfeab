"""Runs of a study beside each other on one machine: a process each, taking turns on the GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qatapult.trainer.loop.interrupt import INTERRUPTED, InterruptFlag
from qatapult.trainer.report.text import duration
from qatapult.trainer.study.plan import PlannedRun
from qatapult.trainer.study.sharing import stage_in_work

_POLL_SECONDS = 0.2


@dataclass
class _Active:
    """A run's process, and the GPU that it was given."""

    run: PlannedRun
    gpu: str | None
    process: subprocess.Popen[bytes]
    log: TextIO
    started: float


class SideBySide:
    """At most so many runs at a time; one that needs what another is computing waits and is given it.

    Args:
        runs: folder of the runs.
        recipes: folder of their recipes, in which what the runs say is kept as well.
        at_once: processes at the same time. Each has its share of the processor's cores, and the GPU that fewest have.
        share: gives a run the stages that others have finished, and names them.
        say: where progress goes.
    """

    def __init__(
        self,
        runs: Path,
        recipes: Path,
        at_once: int,
        share: Callable[[PlannedRun], list[str]],
        say: Callable[[str], None],
    ) -> None:
        self.runs, self.recipes, self.at_once = runs, recipes, at_once
        self.share, self.say = share, say
        self.gpus = _gpus()
        self.active: list[_Active] = []

    def execute(self, left: Sequence[PlannedRun]) -> list[str]:
        """Run what is left; names of those that failed.

        Raises:
            SystemExit: with `INTERRUPTED` after a signal, once every process has written its checkpoint and ended.
        """
        waiting, failed, total = list(left), [], len(left)
        with InterruptFlag() as flag:
            try:
                while (waiting or self.active) and flag.received is None:
                    failed += self._reap()
                    ready = next((run for run in waiting if not self._waits(run)), None)
                    if ready is not None and len(self.active) < self.at_once:
                        waiting.remove(ready)
                        self._start(ready, f"[{total - len(waiting)}/{total}]")
                    else:
                        time.sleep(_POLL_SECONDS)
            finally:
                self._stop()  # whatever ended the loop, no run outlives it
            if flag.received is not None:
                raise SystemExit(INTERRUPTED)
        return failed

    def _waits(self, run: PlannedRun) -> bool:
        others = [(one.run.folder(self.runs), one.run.recipe) for one in self.active]
        return stage_in_work(run.folder(self.runs), run.recipe, others) is not None

    def _start(self, run: PlannedRun, where: str) -> None:
        name, given = run.recipe.name, self.share(run)
        self.say(f"{where} {name}: {run.cell.label}" + (f" ({' and '.join(given)} shared)" if given else ""))
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        gpu = min(self.gpus, key=lambda one: sum(a.gpu == one for a in self.active), default=None)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "qatapult.trainer", str(self.recipes / f"{name}.yaml")]
        log = (self.recipes / f"{name}.log").open("a", encoding="utf-8")
        process = subprocess.Popen(
            [*command, "--runs", str(self.runs), "--quiet"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.active.append(_Active(run, gpu, process, log, time.monotonic()))

    def _reap(self) -> list[str]:
        """Names of the runs that have failed since the last time."""
        ended = [one for one in self.active if one.process.poll() is not None]
        for one in ended:
            self.active.remove(one)
            one.log.close()
            name, status = one.run.recipe.name, one.process.returncode
            how, where = (
                ("done", "")
                if status == 0
                else (f"failed with exit status {status}", f", see {one.log.name}")
            )
            self.say(f"{name}: {how} after {duration(time.monotonic() - one.started)}{where}")
        return [one.run.recipe.name for one in ended if one.process.returncode != 0]

    def _stop(self) -> None:
        """Ask every process that is left for its checkpoint, and wait."""
        for one in self.active:
            one.process.send_signal(signal.SIGTERM)
        if self.active:
            self.say(f"interrupted: {len(self.active)} runs write their checkpoints")
        for one in self.active:
            one.process.wait()
            one.log.close()


def _gpus() -> list[str]:
    """Indices as `CUDA_VISIBLE_DEVICES` names them; none on a machine without."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]
