"""The same verbs without Slurm: a queue on this machine that keeps its state in the run folders.

One background process for a folder of runs starts what is queued, N at a time, and leaves when nothing is
left. It holds no state of its own: killed, or lost with the machine, the next one finds in
`launch/local.json` what was queued, adopts what still runs, and queues again what died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from qatapult.launch import attempts
from qatapult.launch.folder import LaunchFolder, Submission, all_runs, prepare_run
from qatapult.launch.owner import boot_id
from qatapult.launch.script import engine_arguments
from qatapult.trainer.loop.interrupt import INTERRUPTED as EXIT_REQUEUE
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_json

_POLL_SECONDS = 0.5
_TAKE_OVER_SECONDS = 5.0
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Entry:
    """`launch/local.json`: where a run is in this machine's queue."""

    queued: bool
    pid: int = 0
    pid_started: float = 0.0
    boot: str = ""
    attempt: str = ""
    gpus: tuple[int, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the run's process is there."""
        if not self.pid or self.boot != boot_id():
            return False
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.pid_started) < 2.0
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


def submit_local(recipe: Recipe, runs: Path, processes: int, at_once: int, engine: str | None) -> Submission:
    """Put a run into the queue, and start the queue if it does not run.

    Raises:
        UserError: the run is under way or finished already, or its folder does not do.
    """
    launch = prepare_run(recipe, runs)
    if launch.run.stage("report").exists():
        raise UserError(f"run {launch.run.name} is finished; its report is {launch.run.report_html}")
    submission = Submission(
        where="local", processes=processes, at_once=at_once, engine=engine, workdir=str(Path.cwd())
    )
    enqueue(launch, submission)
    start_queue(runs)
    return submission


def enqueue(launch: LaunchFolder, submission: Submission) -> None:
    """Put a run into the queue, with its failures forgiven.

    Raises:
        UserError: it is in the queue already.
    """
    if (state := local_state(launch)) is not None:
        raise UserError(f"run {launch.run.name} is already {state} on this machine")
    if launch.read_attempts():
        launch.append_attempt({"event": "resume"})
    launch.write_submission(replace(submission, cancelled=False, submitted=time.time()))
    _write(launch, Entry(queued=True))


def start_queue(runs: Path) -> None:
    """Start the queue's process in the background; a second one leaves by itself."""
    with (runs / ".local-queue.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "qatapult.launch.local", str(runs.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def local_state(launch: LaunchFolder) -> str | None:
    """`queued`, `running`, or None for a run that this machine's queue does not have."""
    entry, submission = read_entry(launch), launch.submission
    if entry is None:
        return None
    if entry.alive:
        return "running"
    return "queued" if entry.queued and submission is not None and not submission.cancelled else None


def cancel_local(launch: LaunchFolder) -> None:
    """Ask the ranks of a cancelled run to checkpoint and stop; one that waits needs only its mark."""
    entry = read_entry(launch)
    if entry is not None and entry.alive:
        tell(entry.pid, signal.SIGTERM)


def tell(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and all below it: launchers put ranks into sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)


class Queue:
    """The background process."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._cancelled_at: dict[Path, float] = {}

    def work(self) -> None:
        """Run until nothing is queued or running."""
        while True:
            launches = [launch for launch in all_runs(self._runs) if _is_ours(launch)]
            running = [launch for launch in launches if self._still_runs(launch)]
            queued = sorted(
                (launch for launch in launches if local_state(launch) == "queued"),
                key=lambda launch: _submission(launch).submitted,
            )
            if not running and not queued:
                return
            newest = max(launches, key=lambda launch: _submission(launch).submitted)
            if queued and len(running) < _submission(newest).at_once:
                self._start(queued[0], running)
            else:
                time.sleep(_POLL_SECONDS)

    def _still_runs(self, launch: LaunchFolder) -> bool:
        """Whether a run's process is there; what ended is settled."""
        entry = read_entry(launch)
        if entry is None or not entry.pid:
            return False
        if entry.alive:
            self._kill_if_cancelled_long_ago(launch, entry)
            return True
        # A child of an earlier queue process has no status: what is known, its ranks left in the run folder.
        child = self._children.pop(launch.run.path, None)
        verdict = attempts.end(launch, entry.attempt, child.wait() if child is not None else None, "")
        _say(f"{launch.run.name}: {verdict.how}: {verdict.reason}")
        _write(launch, Entry(queued=verdict.exit_status == EXIT_REQUEUE))
        return False

    def _kill_if_cancelled_long_ago(self, launch: LaunchFolder, entry: Entry) -> None:
        if _submission(launch).cancelled:
            since = self._cancelled_at.setdefault(launch.run.path, time.monotonic())
            if time.monotonic() - since > _GRACE_SECONDS:
                tell(entry.pid, signal.SIGKILL)

    def _start(self, launch: LaunchFolder, running: list[LaunchFolder]) -> None:
        submission = _submission(launch)
        gpus = _free_gpus(submission.processes, running)
        if gpus is None:
            time.sleep(_POLL_SECONDS)
            return
        attempt = f"local-{uuid.uuid4().hex[:8]}.0"
        verdict = attempts.begin(launch, attempt, os.uname().nodename, submission.processes)
        if verdict.exit_status != attempts.EXIT_GO_ON:
            _say(f"{launch.run.name}: {verdict.how}: {verdict.reason}")
            _write(launch, Entry(queued=False))
            return
        child = _spawn(launch, submission, attempt, gpus)
        self._children[launch.run.path] = child
        started = psutil.Process(child.pid).create_time()
        _write(launch, Entry(False, child.pid, started, boot_id(), attempt, gpus))
        _say(f"{launch.run.name}: attempt {attempt} is process {child.pid}")


def _spawn(
    launch: LaunchFolder, submission: Submission, attempt: str, gpus: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    ranks = submission.processes
    words = [sys.executable, "-m", "qatapult.launch.rank", str(launch.run.path)]
    if ranks > 1:
        engine = engine_arguments(submission.engine or "ddp", ranks)
        start = [sys.executable, "-m", "accelerate.commands.launch", *engine, "--num_machines", "1"]
        start += ["--num_processes", str(ranks), "--main_process_port", "0", "-m", *words[2:]]
        # The launcher ignores what its ranks handle, as on a cluster.
        words = ["bash", "-c", f"trap '' USR1 TERM; exec {shlex.join(start)}"]
    environment = {
        **os.environ,
        "QATAPULT_ATTEMPT": attempt,
        "QATAPULT_WORLD_SIZE": str(ranks),
        "PET_SIGNALS_TO_HANDLE": "SIGINT",
        "PYTHONUNBUFFERED": "1",
    }
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    elif (submission.engine or "ddp") == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
    launch.run.logs.mkdir(parents=True, exist_ok=True)
    with (launch.run.logs / "local.out").open("ab") as log:
        return subprocess.Popen(
            words,
            cwd=submission.workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _free_gpus(wanted: int, running: list[LaunchFolder]) -> tuple[int, ...] | None:
    """GPUs for a run: none on a machine without, None while too few are free."""
    everything = gpus_of_this_machine()
    if not everything:
        return ()
    taken = {gpu for launch in running if (entry := read_entry(launch)) is not None for gpu in entry.gpus}
    free = [gpu for gpu in everything if gpu not in taken]
    return tuple(free[:wanted]) if len(free) >= wanted else None


def gpus_of_this_machine() -> list[int]:
    """Indices of the GPUs that this shell may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(word) for word in visible.split(",") if word.strip().isdigit()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


def _is_ours(launch: LaunchFolder) -> bool:
    submission = launch.submission
    return submission is not None and submission.where == "local" and read_entry(launch) is not None


def _submission(launch: LaunchFolder) -> Submission:
    submission = launch.submission
    assert submission is not None
    return submission


def read_entry(launch: LaunchFolder) -> Entry | None:
    """The run's place in the queue; None for one that never was in it."""
    try:
        raw = json.loads((launch.path / "local.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Entry(**{**raw, "gpus": tuple(raw["gpus"])})


def _write(launch: LaunchFolder, entry: Entry) -> None:
    write_json(launch.path / "local.json", asdict(entry))


def _say(text: str) -> None:
    print(f"{time.strftime('%F %T')} {text}", flush=True)


@contextlib.contextmanager
def _only_queue(runs: Path) -> Iterator[bool]:
    """Whether this is the one queue of the folder; waits for one that is just leaving."""
    with (runs / ".local-queue.lock").open("w") as file:
        give_up = time.monotonic() + _TAKE_OVER_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > give_up:
                    yield False
                    return
                time.sleep(_POLL_SECONDS)
                continue
            yield True
            return


def main() -> None:
    """Entry point of the background process."""
    runs = Path(sys.argv[1])
    with _only_queue(runs) as ours:
        if ours:
            Queue(runs).work()


if __name__ == "__main__":
    main()
