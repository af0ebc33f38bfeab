"""Who may write into a run: one attempt at a time, so that an orphan cannot write into a run that went on.

`owner.json` in the run folder names the owner and carries a token that grows with every change of hands (a
fencing token, Kleppmann 2016). The owner renews its lease from a thread; a claim succeeds when the run is
free: nobody owns it, the owner's process is gone, its lease ran out, or it was an earlier attempt of the same
job. Writers call `check()` before they write, or write inside `writing()`, which no claim can interrupt.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import RunFolder, write_json

LEASE_SECONDS = 90.0
RENEW_SECONDS = 10.0
_LOCK_WAIT_SECONDS = 30.0
_LOCK_FILE = ".owner.lock"


class RunLost(UserError):
    """Another attempt owns the run now; this process must not write any more."""


@dataclass(frozen=True)
class Ticket:
    """What `owner.json` holds."""

    token: int
    identity: str
    attempt: str | None
    host: str
    boot: str
    pid: int
    pid_started: float
    claimed: float

    def describe(self) -> str:
        job = f"job {self.attempt.rpartition('.')[0]}, " if self.attempt else ""
        return f"{job}process {self.pid} on {self.host}"


class Owner:
    """The right to write into a run, until somebody else has it."""

    def __init__(self, run: RunFolder, ticket: Ticket, renews: bool) -> None:
        self._run = run
        self.ticket = ticket
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if renews:
            self._thread = threading.Thread(target=self._renew, name="run-owner-lease", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Assert that this process still may write into the run.

        Raises:
            RunLost: another attempt took the run over.
        """
        current = _read(self._run)
        if current is None or current.identity != self.ticket.identity:
            taker = current.describe() if current else "nobody"
            raise RunLost(
                f"run {self._run.name} now belongs to {taker}; this process ({self.ticket.describe()}) "
                "was given up for dead and writes no more"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run while writing: a claim waits until the block is left.

        Raises:
            RunLost: another attempt took the run over.
        """
        with _locked(self._run, wait=None):
            self.check()
            yield

    def release(self) -> None:
        """Give the run back, so that the next attempt need not wait for the lease to run out."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with _locked(self._run, wait=_LOCK_WAIT_SECONDS):
            current = _read(self._run)
            if current is not None and current.identity == self.ticket.identity:
                # The token stays: it must grow for ever.
                write_json(self._run.owner, {**asdict(current), "identity": "", "attempt": None})

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            current = _read(self._run)
            if current is None or current.identity != self.ticket.identity:
                return
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._run.owner)


def claim(folder: Path | RunFolder) -> Owner:
    """Take a run over. Call it on the main process, before anything in the run folder is read.

    A job waits for the lease of a dead predecessor to run out; a person at a terminal is told at once.

    Raises:
        UserError: the folder is another user's, or another live process owns the run.
    """
    run = _run_folder(folder)
    check_folder_is_ours(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    attempt = os.environ.get("QATAPULT_ATTEMPT")
    give_up = time.monotonic() + (LEASE_SECONDS + RENEW_SECONDS if attempt else 0.0)
    while (owner := _try_to_claim(run, attempt, last_try=time.monotonic() >= give_up)) is None:
        time.sleep(1.0)
    return owner


def _try_to_claim(run: RunFolder, attempt: str | None, last_try: bool) -> Owner | None:
    with _locked(run, wait=_LOCK_WAIT_SECONDS):
        current = _read(run)
        if current is not None and _alive(run, current, attempt):
            if not last_try:
                return None
            raise UserError(
                f"run {run.name} is being written by {current.describe()}; wait for it, or stop it with "
                f"`qatapult cancel {run.name}`"
            )
        ticket = Ticket(
            token=(current.token if current else 0) + 1,
            identity=uuid.uuid4().hex,
            attempt=attempt,
            host=socket.gethostname(),
            boot=boot_id(),
            pid=os.getpid(),
            pid_started=psutil.Process().create_time(),
            claimed=time.time(),
        )
        write_json(run.owner, asdict(ticket))
    return Owner(run, ticket, renews=True)


def join(folder: Path | RunFolder) -> Owner:
    """Share the claim of this job's main process. Call it on the other ranks, after a barrier.

    Raises:
        RunLost: the run belongs to another attempt than this process's.
    """
    run = _run_folder(folder)
    current = _read(run)
    attempt = os.environ.get("QATAPULT_ATTEMPT")
    if current is None or not current.identity or current.attempt != attempt:
        raise RunLost(
            f"run {run.name} belongs to another attempt ({current.describe() if current else 'nobody'})"
        )
    return Owner(run, current, renews=False)


def check_folder_is_ours(folder: Path) -> None:
    """Refuse a run folder that another user owns.

    Raises:
        UserError: it exists and is another user's.
    """
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        raise UserError(f"run folder {folder} belongs to user {owner}; choose another name or --runs folder")


def _alive(run: RunFolder, ticket: Ticket, attempt: str | None) -> bool:
    """Whether the owner on record must still be taken for alive by `attempt`."""
    if not ticket.identity:
        return False
    if attempt and ticket.attempt and ticket.attempt.rpartition(".")[0] == attempt.rpartition(".")[0]:
        return False  # an earlier attempt of this very job, which Slurm gave up
    if ticket.host == socket.gethostname():
        if ticket.boot != boot_id():
            return False
        # A cluster job's process may live in a container, with process numbers of its own.
        if not ticket.attempt or ticket.attempt.startswith("local"):
            return _is_another_process(ticket.pid, ticket.pid_started)
    # Both times come from the file server's clock: nodes' clocks may differ.
    now = (run.path / _LOCK_FILE).stat().st_mtime
    return now - run.owner.stat().st_mtime < LEASE_SECONDS


def _is_another_process(pid: int, started: float) -> bool:
    if pid == os.getpid():
        return False
    try:
        return abs(psutil.Process(pid).create_time() - started) < 2.0
    except psutil.NoSuchProcess:
        return False


def boot_id() -> str:
    """Names this start of this machine: process numbers mean nothing beyond it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _read(run: RunFolder) -> Ticket | None:
    try:
        return Ticket(**json.loads(run.owner.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _run_folder(folder: Path | RunFolder) -> RunFolder:
    return folder if isinstance(folder, RunFolder) else RunFolder(folder)


@contextlib.contextmanager
def _locked(run: RunFolder, wait: float | None) -> Iterator[None]:
    """Hold the lock on the owner's file.

    A claim waits only so long: the holder may be an orphan on a node that hangs, and then the lease decides.
    File systems without locks (some Lustre mounts) leave the lease as the only guard.
    """
    with (run.path / _LOCK_FILE).open("a", encoding="utf-8") as file:
        _lock(file, wait)
        os.utime(run.path / _LOCK_FILE)
        yield


def _lock(file: TextIO, wait: float | None) -> None:
    give_up = None if wait is None else time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if give_up is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if give_up is not None and time.monotonic() > give_up:
                return
            time.sleep(0.05)
        except OSError:  # ENOLCK, EOPNOTSUPP: no locks here
            return
