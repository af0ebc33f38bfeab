"""What a run is doing: read from its folder, and from Slurm or the local queue where it was sent.

The folder alone is enough to know how far a run is and how its attempts ended; the scheduler adds whether it
is alive. So everything here works without accounting, and says less, not nothing, when Slurm is silent.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qatapult.launch import slurm
from qatapult.launch.attempts import CANCELLED, FAILED, REFUSED, last_begin, last_end, why_stopped
from qatapult.launch.folder import LaunchFolder, Submission
from qatapult.launch.local import local_state
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe

# States of a run that may still write something.
LIVE = ("queued", "requeued", "running", "completing", "configuring", "suspended")

_TAIL_BYTES = 65536
# A process that was started by hand writes metrics at every step; a silent one is not counted as running.
_SILENCE_SECONDS = 600.0


@dataclass(frozen=True)
class RunState:
    """One line of `qatapult runs`."""

    name: str
    folder: str
    state: str
    stages: list[str]
    job: str | None = None
    nodes: str = ""
    step: int | None = None
    tokens: int | None = None
    tokens_total: int | None = None
    loss: float | None = None
    recovery: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    attempts: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(launches: Sequence[LaunchFolder]) -> list[RunState]:
    """States of several runs, with one question to Slurm for all of them."""
    submissions = {launch.run.path: launch.submission for launch in launches}
    wanted = [s.job for s in submissions.values() if s is not None and s.where == "slurm" and s.job]
    known: dict[str, slurm.JobState] = {}
    silent = ""
    if wanted:
        try:
            known = slurm.jobs(wanted)
        except UserError as error:
            silent = str(error)
    return [_describe(launch, submissions[launch.run.path], known, silent) for launch in launches]


def _describe(
    launch: LaunchFolder, submission: Submission | None, known: dict[str, slurm.JobState], silent: str
) -> RunState:
    run = launch.run
    attempts = launch.read_attempts()
    begun = last_begin(attempts)
    job = known.get(submission.job) if submission is not None and submission.job else None
    state, reason = _state(launch, submission, job, silent)
    figures = _figures(launch)
    speed = figures.get("train/tokens_per_second")
    total = _tokens_total(launch)
    left = None
    if state == "running" and speed and total and "qat" not in run.finished():
        left = max(0.0, total - figures.get("tokens", 0)) / speed
    return RunState(
        name=run.name,
        folder=str(run.path),
        state=state,
        stages=run.finished(),
        job=submission.job if submission is not None else None,
        nodes=job.nodes if job is not None and not job.ended else (begun or {}).get("where", ""),
        step=figures.get("step"),
        tokens=figures.get("tokens"),
        tokens_total=total,
        loss=figures.get("train/loss"),
        recovery=_recovery(launch, figures),
        tokens_per_second=speed if state == "running" else None,
        seconds_left=left,
        attempts=sum(line["event"] == "begin" for line in attempts),
        reason=reason,
    )


def _state(
    launch: LaunchFolder, submission: Submission | None, job: slurm.JobState | None, silent: str
) -> tuple[str, str]:
    """The state in one word, and why."""
    if launch.run.stage("report").exists():
        return "finished", ""
    if submission is None:
        return _state_by_hand(launch)
    ended = last_end(launch.read_attempts())
    if submission.where == "local":
        alive = local_state(launch)
    else:
        alive = _slurm_word(job)
    if alive is not None:
        waits = job is not None and alive in ("queued", "requeued") and job.reason != "None"
        return alive, job.reason if job is not None and waits else ""
    if submission.cancelled or (job is not None and job.state == "CANCELLED"):
        return CANCELLED, ""
    if (stopped := why_stopped(launch)) is not None:
        return FAILED, stopped
    if silent:
        return "unknown", silent
    if ended is not None and ended["how"] in (FAILED, REFUSED):
        return FAILED, ended["reason"]
    ending = job.state.lower() if job is not None else "forgotten by Slurm"
    if submission.where == "local":
        ending = "its process is gone"
    return "stopped", f"{ending}; go on with: qatapult resume {launch.run.name}"


def _slurm_word(job: slurm.JobState | None) -> str | None:
    """A live job's state in our words; None for one that has ended."""
    if job is None or job.ended:
        return None
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"):
        return "requeued" if job.restarts else "queued"
    return "running" if job.state in ("RUNNING", "CONFIGURING") else job.state.lower()


def _state_by_hand(launch: LaunchFolder) -> tuple[str, str]:
    """A run that `qatapult train` started has no submission."""
    if launch.run.metrics.exists() and time.time() - launch.run.metrics.stat().st_mtime < _SILENCE_SECONDS:
        return "running", "started by hand"
    return "stopped", "not submitted"


def _tokens_total(launch: LaunchFolder) -> int | None:
    """Training length; unknown for a run of another version, whose recipe this one does not read."""
    try:
        return load_recipe(launch.run.recipe).qat.tokens
    except UserError:
        return None


def _figures(launch: LaunchFolder) -> dict[str, Any]:
    """The newest value of every figure in the last part of `metrics.jsonl`."""
    newest: dict[str, Any] = {}
    for line in _last_lines(launch.run.metrics):
        newest.update(line)
    return newest


def _last_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The last whole lines of a JSONL file, which may be long."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        lines = stream.read().split(b"\n")
    # The first line may be cut, and the last has no end yet or is empty.
    for line in lines[1 if size > _TAIL_BYTES else 0 : -1]:
        yield json.loads(line)


def _recovery(launch: LaunchFolder, figures: dict[str, Any]) -> float | None:
    """The report's recovery, which is the packed model's; before it the training's newest."""
    if launch.run.report_json.exists():
        report = json.loads(launch.run.report_json.read_text(encoding="utf-8"))
        return report["metrics"]["perplexity"].get("recovery")
    return figures.get("recovery/perplexity")
