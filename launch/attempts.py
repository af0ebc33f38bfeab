"""The attempts of a run under a scheduler, and what follows from how the last one ended.

The batch script calls `python -m qatapult.launch.attempts begin RUN …` before the ranks start and `end RUN …`
after them. The exit status tells the script what to do; everything else stands in `launch/attempts.jsonl`.
Without accounting this list is the only memory of what happened, so it is also what `qatapult status` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatapult.launch.folder import LaunchFolder
from qatapult.launch.owner import check_folder_is_ours
from qatapult.trainer.loop.interrupt import INTERRUPTED as EXIT_REQUEUE
from qatapult.trainer.recipe.errors import EXIT_STATUS, UserError
from qatapult.trainer.run_folder import RunFolder, write_json

EXIT_GO_ON = 0
EXIT_FINISHED = 3
EXIT_STOP = 1
MAX_FAILURES = 3

# How an attempt ended.
FINISHED, PREEMPTED, CANCELLED = "finished", "preempted", "cancelled"
REFUSED, FAILED, DIED = "refused", "failed", "died"


@dataclass(frozen=True)
class Verdict:
    """What the script does next, and why."""

    exit_status: int
    how: str
    reason: str


def progress(run: RunFolder) -> list[int]:
    """How far a run has come: finished stages, and the step of the newest checkpoint."""
    steps = [
        int(found[1])
        for path in run.checkpoints.glob("step-*")
        if (found := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [len(run.finished()), max(steps, default=-1)]


def begin(launch: LaunchFolder, attempt: str, where: str, ranks: int) -> Verdict:
    """Record that an attempt starts, unless there is nothing to do or no sense in trying."""
    run = launch.run
    _close_a_dead_attempt(launch)
    if run.stage("report").exists():
        return Verdict(EXIT_FINISHED, FINISHED, f"run {run.name} is finished; nothing to do")
    submission = launch.submission
    if submission is not None and submission.cancelled:
        return Verdict(EXIT_STOP, CANCELLED, f"run {run.name} was cancelled")
    if (reason := why_stopped(launch)) is not None:
        return Verdict(EXIT_STOP, FAILED, reason)
    launch.append_attempt(
        {"event": "begin", "attempt": attempt, "where": where, "ranks": ranks, "progress": progress(run)}
    )
    return Verdict(EXIT_GO_ON, "running", f"attempt {attempt} begins")


def end(launch: LaunchFolder, attempt: str, status: int | None, notice: str) -> Verdict:
    """Record how an attempt ended and decide whether another one follows.

    Args:
        launch: of the run.
        attempt: its name.
        status: of the ranks' launcher; None where nobody saw it end.
        notice: the signal that the batch script had: `USR1`, `TERM`, `LIMIT`, or nothing.
    """
    last = last_begin(launch.read_attempts())
    if last is None or last["attempt"] != attempt:
        # This is the script of an orphan: Slurm gave it up, and the run belongs to a later attempt.
        return Verdict(EXIT_STOP, DIED, f"attempt {attempt} was given up for dead; another one has the run")
    how, reason = _judge(launch, last, status, notice)
    launch.append_attempt(
        {
            "event": "end",
            "attempt": attempt,
            "how": how,
            "reason": reason,
            "status": status,
            "progress": progress(launch.run),
        }
    )
    if how == FINISHED:
        return Verdict(0, how, reason)
    if how == REFUSED:
        return Verdict(EXIT_STATUS, how, reason)
    if how == CANCELLED:
        return Verdict(EXIT_STOP, how, reason)
    if (stopped := why_stopped(launch)) is not None:
        return Verdict(EXIT_STOP, FAILED, stopped)
    return Verdict(EXIT_REQUEUE, how, reason)


def why_stopped(launch: LaunchFolder) -> str | None:
    """Why no further attempt makes sense, or None."""
    ends = _ends_since_resume(launch.read_attempts())
    if ends and ends[-1]["how"] == REFUSED:
        return str(ends[-1]["reason"])
    failures: list[dict[str, Any]] = []
    for line in reversed(ends):
        if line["progress"] != line["progress_before"]:
            break
        if line["how"] in (FAILED, DIED):
            failures.append(line)
    if len(failures) < MAX_FAILURES:
        return None
    return (
        f"run {launch.run.name} failed {len(failures)} times without progress, the last time: "
        f"{failures[0]['reason']}; the logs are in {launch.run.logs}; when the cause is mended: "
        f"qatapult resume {launch.run.name}"
    )


def last_begin(attempts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest attempt's first line."""
    return next((line for line in reversed(attempts) if line["event"] == "begin"), None)


def last_end(attempts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest attempt's last line; None while it runs."""
    for line in reversed(attempts):
        if line["event"] == "end":
            return line
        if line["event"] == "begin":
            break
    return None


def write_outcome(launch: LaunchFolder, attempt: str, rank: int, code: int, reason: str) -> None:
    """Leave word of how a rank ended, for `end`."""
    write_json(launch.outcome(attempt, rank), {"code": code, "rank": rank, "reason": reason})


def _judge(launch: LaunchFolder, begun: dict[str, Any], status: int | None, notice: str) -> tuple[str, str]:
    run, attempt = launch.run, begun["attempt"]
    if run.stage("report").exists():
        return FINISHED, "the report is written"
    submission = launch.submission
    if submission is not None and submission.cancelled:
        return CANCELLED, "cancelled by `qatapult cancel`"
    outcomes = _outcomes(launch, attempt)
    refused = next((outcome for outcome in outcomes if outcome["code"] == EXIT_STATUS), None)
    if refused is not None:
        return REFUSED, refused["reason"]
    failed = [outcome for outcome in outcomes if outcome["code"] not in (0, EXIT_REQUEUE)]
    if notice in ("USR1", "LIMIT"):
        if progress(run) != begun["progress"]:
            return PREEMPTED, "the time limit came near"
        too_short = (
            "no stage and no checkpoint was finished within the time limit: ask for more time or nodes"
        )
        return FAILED, _first_error(failed) if failed else too_short
    if notice or any(outcome["code"] == EXIT_REQUEUE for outcome in outcomes):
        return PREEMPTED, "told to stop by SIGTERM: preempted, cancelled, or another node of the job died"
    if failed:
        return FAILED, _first_error(failed)
    if status is None:
        return DIED, f"attempt {attempt} ended without a word: it was killed, or the machine went down"
    return FAILED, f"the ranks ended with status {status} and left no word; see the job's log"


def _first_error(failed: Sequence[dict[str, Any]]) -> str:
    return f"rank {failed[0]['rank']}: {failed[0]['reason']}"


def _outcomes(launch: LaunchFolder, attempt: str) -> list[dict[str, Any]]:
    """What the ranks left, the earliest first: the first error is the cause of the others."""
    files = list((launch.path / "outcomes").glob(f"{attempt}-rank-*.json"))
    return [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda f: f.stat().st_mtime_ns)
    ]


def _close_a_dead_attempt(launch: LaunchFolder) -> None:
    attempts = launch.read_attempts()
    begun = last_begin(attempts)
    if begun is None or attempts[-1]["event"] != "begin":
        return
    launch.append_attempt(
        {
            "event": "end",
            "attempt": begun["attempt"],
            "how": DIED,
            "reason": f"attempt {begun['attempt']} on {begun['where']} ended without a word: "
            "a node died, or the job was killed",
            "status": None,
            "progress": progress(launch.run),
        }
    )


def _ends_since_resume(attempts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ends of attempts since the last `qatapult resume`, each with the progress from before it."""
    ends: list[dict[str, Any]] = []
    before: list[int] | None = None
    for line in attempts:
        if line["event"] == "resume":
            ends = []
        elif line["event"] == "begin":
            before = line["progress"]
        elif line["event"] == "end":
            ends.append({**line, "progress_before": before})
    return ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point for the batch script."""
    parser = argparse.ArgumentParser(prog="qatapult.launch.attempts")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("begin", "end"):
        verbs.add_parser(verb).add_argument("run", type=Path)
    verbs.choices["begin"].add_argument("--where", required=True)
    verbs.choices["begin"].add_argument("--ranks", type=int, required=True)
    verbs.choices["end"].add_argument("--status", type=int, required=True)
    verbs.choices["end"].add_argument("--notice", default="")
    options = parser.parse_args(arguments)
    launch = LaunchFolder(RunFolder(options.run))
    attempt = os.environ["QATAPULT_ATTEMPT"]
    try:
        check_folder_is_ours(options.run)
        if options.verb == "begin":
            verdict = begin(launch, attempt, options.where, options.ranks)
        else:
            verdict = end(launch, attempt, options.status, options.notice)
    except UserError as error:
        print(f"qatapult: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(f"qatapult: {verdict.how}: {verdict.reason}", flush=True)
    return verdict.exit_status


if __name__ == "__main__":
    sys.exit(main())
