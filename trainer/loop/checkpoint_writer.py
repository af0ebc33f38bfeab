"""Writes a checkpoint with all processes, so that it appears under its name only when it is whole.

Every process writes its own files into a hidden folder and leaves their checksums there; when all have, the main
process adds the manifest and renames the folder. No message passes between processes meanwhile, so this can happen
in a thread, from copies in main memory, while training goes on; whether it went well is asked before the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from qatapult.launch.owner import Owner
from qatapult.trainer.loop.fragments import Fragment, write_fragments
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_json

MANIFEST = "manifest.json"
FORMAT = 2
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Contents:
    """What one process writes.

    Attributes:
        tensors: file name to fragments.
        texts: file name to what goes into it as JSON.
        about: the manifest's fields beside the checksums.
    """

    tensors: Mapping[str, Sequence[Fragment]]
    texts: Mapping[str, Any]
    about: Mapping[str, Any]

    def copied(self) -> Contents:
        """The same with tensors that training does not change any more."""
        tensors = {name: [f.copied() for f in fragments] for name, fragments in self.tensors.items()}
        return Contents(tensors, self.texts, self.about)


class CheckpointWriter:
    """Writes one checkpoint at a time. All processes call its methods together.

    Args:
        accelerator: for the processes' meetings.
        asynchronous: write from a thread.
        owner: the main process's right to write into the run.
    """

    def __init__(self, accelerator: Accelerator, asynchronous: bool, owner: Owner | None = None) -> None:
        self._accelerator = accelerator
        self._asynchronous = asynchronous
        self._owner = owner
        self._job: _Job | None = None

    def write(self, folder: Path, contents: Contents, on_whole: Callable[[], None]) -> None:
        """Write a checkpoint, or begin to.

        Args:
            folder: where it appears when it is whole.
            contents: this process's part.
            on_whole: called on the main process once it is there.

        Raises:
            UserError: if this one, or the one before where it was written meanwhile, could not be written.
        """
        self.finish()
        if self._owner is not None:
            self._owner.check()
        building = folder.with_name(f".{folder.name}.building")
        if self._accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        if self._asynchronous:
            contents = contents.copied()
        self._job = _Job(folder, building, rank, processes, contents, self._owner, on_whole)
        if self._asynchronous:
            self._job.start()
        else:
            self._job.write_own()
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            UserError: on all processes, naming the one that could not write and why.
        """
        job, self._job = self._job, None
        if job is None:
            return
        job.own_written.wait()
        try:
            self._raise_failures(job)
            if self._accelerator.is_main_process:
                job.complete()
            self._raise_failures(job)
        except UserError:
            job.abandon()
            raise

    def _raise_failures(self, job: _Job) -> None:
        failures = [text for text in gather_object([job.failure]) if text is not None]
        if failures:
            raise UserError(
                f"checkpoint {job.folder.name} could not be written: {failures[0]}; earlier ones are untouched"
            )


class _Job:
    """One process's part in one checkpoint."""

    def __init__(
        self,
        folder: Path,
        building: Path,
        rank: int,
        processes: int,
        contents: Contents,
        owner: Owner | None,
        on_whole: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.own_written = threading.Event()
        self.failure: str | None = None
        self._building = building
        self._rank = rank
        self._processes = processes
        self._contents = contents
        self._owner = owner
        self._on_whole = on_whole
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write in a thread; the main process's also waits for the others there and completes the checkpoint."""
        self._thread = threading.Thread(target=self._write_meanwhile, name="checkpoint", daemon=True)
        self._thread.start()

    def write_own(self) -> None:
        """Write this process's files, and their checksums last."""
        try:
            checksums = {
                name: write_fragments(self._building / name, fragments)
                for name, fragments in self._contents.tensors.items()
            }
            for name, value in self._contents.texts.items():
                write_json(self._building / name, value)
                checksums[name] = checksum(self._building / name)
            write_json(self._part(self._rank), checksums)
        except Exception as error:  # whatever it is, the other processes wait to hear of it
            self.failure = f"rank {self._rank}: {error}"
        finally:
            self.own_written.set()

    def complete(self) -> None:
        """On the main process, when all have written: the manifest, the name, and what follows from it."""
        if self._thread is not None:
            self._thread.join()
        else:
            self._commit()

    def abandon(self) -> None:
        """Leave nothing half-written behind."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        if self._rank == 0:
            shutil.rmtree(self._building, ignore_errors=True)

    def _write_meanwhile(self) -> None:
        self.write_own()
        if self._rank == 0 and self.failure is None:
            while not all(self._part(rank).exists() for rank in range(self._processes)):
                if self._given_up.wait(_POLL_SECONDS):
                    return
            self._commit()

    def _commit(self) -> None:
        try:
            files: dict[str, str] = {}
            for rank in range(self._processes):
                files |= json.loads(self._part(rank).read_text(encoding="utf-8"))
                self._part(rank).unlink()
            about = {"format": FORMAT, "processes": self._processes, **self._contents.about}
            write_json(self._building / MANIFEST, {**about, "files": dict(sorted(files.items()))})
            with self._owner.writing() if self._owner is not None else nullcontext():
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self._building.rename(self.folder)
                _flush(self.folder.parent)
            self._on_whole()
        except Exception as error:  # a thread's would be lost
            self.failure = str(error)

    def _part(self, rank: int) -> Path:
        return self._building / f".written-{rank}.json"


def checksum(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(folder: Path) -> None:
    """Bring a folder's entries to the disk: a renamed folder must survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
