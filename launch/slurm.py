"""Slurm's own commands, and what they print. Nothing here needs accounting (slurmdbd)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatapult.trainer.recipe.errors import UserError

_TIMEOUT_SECONDS = 60
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
_ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}


@dataclass(frozen=True)
class JobState:
    """What Slurm knows of a job."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


def available() -> bool:
    """Whether Slurm's commands are installed here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def check_script(text: str) -> str:
    """Ask Slurm whether it would take a script, without submitting it.

    Returns:
        Slurm's estimate of the start.

    Raises:
        UserError: it would not, with Slurm's reason.
    """
    _need_slurm()
    done = _call(["sbatch", "--test-only"], stdin=text)
    if done.returncode != 0:
        raise UserError(f"Slurm refuses the job: {_reason(done.stderr)}{_hint(done.stderr)}")
    return _reason(done.stderr)


def submit(script: Path, folder: Path) -> str:
    """Submit a script from a folder, which becomes the job's working directory.

    Returns:
        The job's id.

    Raises:
        UserError: Slurm refuses it.
    """
    done = _call(["sbatch", "--parsable", str(script)], folder)
    if done.returncode != 0:
        raise UserError(f"Slurm refuses the job: {_reason(done.stderr)}{_hint(done.stderr)}")
    return done.stdout.strip().split(";")[0]


def cancel(job: str) -> None:
    """Cancel a job. One that has ended already is no error.

    Raises:
        UserError: Slurm refuses.
    """
    done = _call(["scancel", job])
    if done.returncode != 0 and "already" not in done.stderr and "Invalid job id" not in done.stderr:
        raise UserError(f"Slurm does not cancel job {job}: {_reason(done.stderr)}")


def jobs(wanted: Iterable[str]) -> dict[str, JobState]:
    """The states of jobs, by id: `12`, or `12_3` for a task of an array.

    The queue is asked first, then the controller's memory of ended jobs. One that neither knows is left out.

    Raises:
        UserError: Slurm does not answer.
    """
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        return {}
    done = _call(["squeue", "--me", "--json"])
    if done.returncode != 0:
        raise UserError(f"squeue does not answer: {_reason(done.stderr)}")
    queue = json.loads(done.stdout)["jobs"]
    found = {job: state for job in wanted if (state := _in_queue(job, queue)) is not None}
    for job in wanted:
        if job not in found and (state := _remembered(job)) is not None:
            found[job] = state
    return found


def partitions() -> list[str]:
    """Names of the partitions.

    Raises:
        UserError: Slurm does not answer.
    """
    done = _call(["sinfo", "--noheader", "--format=%R"])
    if done.returncode != 0:
        raise UserError(f"sinfo does not answer: {_reason(done.stderr)}")
    return sorted(set(done.stdout.split()))


def version() -> str:
    """Slurm's version, such as `slurm-wlm 22.05.8`."""
    return _call(["sinfo", "--version"]).stdout.strip()


def _in_queue(job: str, queue: Sequence[dict[str, Any]]) -> JobState | None:
    array, _, task = job.partition("_")
    for entry in queue:
        if task:
            mine = str(_number(entry.get("array_job_id"))) == array and (
                str(_number(entry.get("array_task_id"))) == task
                or _in_ranges(int(task), str(entry.get("array_task_string") or ""))
            )
        else:
            mine = str(entry["job_id"]) == array
        if mine:
            return JobState(
                job,
                _state(entry["job_state"]),
                str(entry.get("state_reason") or ""),
                str(entry.get("nodes") or ""),
                _number(entry.get("restart_cnt")) or 0,
            )
    return None


def _remembered(job: str) -> JobState | None:
    done = _call(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode != 0:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0] if done.stdout else ""))
    if "JobState" not in fields:
        return None
    return JobState(
        job,
        fields["JobState"],
        fields.get("Reason", ""),
        fields.get("NodeList", ""),
        int(fields.get("Restarts", "0")),
    )


def _number(value: Any) -> int | None:
    """A number of Slurm's JSON: plain up to 22.05, `{"set": true, "number": 3}` later."""
    if isinstance(value, dict):
        return int(value["number"]) if value.get("set") else None
    return None if value is None else int(value)


def _state(value: Any) -> str:
    """A state of Slurm's JSON: a word up to 22.05, a list of flags later."""
    return str(value[0] if isinstance(value, list) else value)


def _in_ranges(task: int, ranges: str) -> bool:
    """Whether `1-5,7%2` holds a task: pending tasks of an array share one entry."""
    for part in ranges.partition("%")[0].split(","):
        first, _, last = part.strip("[]").partition("-")
        if first.isdigit() and int(first) <= task <= int(last or first):
            return True
    return False


def _call(
    command: Sequence[str], folder: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, cwd=folder, input=stdin
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here; submit from a login node, or use --local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_TIMEOUT_SECONDS} seconds") from None


def _need_slurm() -> None:
    if not available():
        raise UserError(
            "Slurm is not installed here; submit from a login node, or run on this machine with --local"
        )


def _reason(stderr: str) -> str:
    """Slurm's complaint as one line, without the program's name before every part."""
    lines = (
        re.sub(r"^(sbatch|allocation failure|scancel|squeue|error|sinfo): *", "", line)
        for line in stderr.splitlines()
    )
    parts = [re.sub(r"^(error|allocation failure): *", "", line).strip() for line in lines]
    return "; ".join(dict.fromkeys(part for part in parts if part)) or "it gave no reason"


def _hint(stderr: str) -> str:
    if "invalid partition" in stderr:
        return f" (partitions are {', '.join(partitions())})"
    if "Node count" in stderr or "Requested node configuration" in stderr:
        return " (see `sinfo` for the nodes of each partition; change --nodes or the cluster profile)"
    return ""
