"""`qatapult logs`: the files that a job and its ranks write, to the end or as they grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qatapult.launch.folder import LaunchFolder
from qatapult.trainer.recipe.errors import UserError

_POLL_SECONDS = 0.5


def log_files(launch: LaunchFolder, rank: int | None) -> list[Path]:
    """The job's own log and rank 0's, or one rank's.

    Raises:
        UserError: that rank has written nothing.
    """
    if rank is not None:
        if not launch.rank_log(rank).exists():
            ranks = sorted(int(path.stem[5:]) for path in launch.run.logs.glob("rank-*.log"))
            known = f"there are ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank has started yet"
            raise UserError(f"run {launch.run.name} has no log of rank {rank}; {known}")
        return [launch.rank_log(rank)]
    submission = launch.submission
    job_log = [Path(submission.job_log)] if submission is not None and submission.job_log else []
    return [*job_log, launch.rank_log(0)]


def read(files: Sequence[Path]) -> Iterator[str]:
    """The files' lines, with a heading where there are several."""
    for file in files:
        if file.exists():
            yield from _headed(file, file.read_text(encoding="utf-8", errors="replace"), len(files) > 1)


def follow(files: Sequence[Path], goes_on: Callable[[], bool]) -> Iterator[str]:
    """The files' lines as they come, until nobody writes any more.

    Args:
        files: some may not exist yet.
        goes_on: whether more may come; asked when nothing did.
    """
    positions = dict.fromkeys(files, 0)
    last: Path | None = None
    going = True
    while True:
        came = False
        for file in files:
            if not file.exists():
                continue
            with file.open(encoding="utf-8", errors="replace") as stream:
                stream.seek(positions[file])
                text = stream.read()
                positions[file] = stream.tell()
            if text:
                came = True
                yield from _headed(file, text, len(files) > 1 and file != last)
                last = file
        if not came:
            if not going:
                return
            # What was written before the end was noticed is still read in the next round.
            going = goes_on()
            time.sleep(_POLL_SECONDS)


def _headed(file: Path, text: str, heading: bool) -> Iterator[str]:
    if heading:
        yield f"==> {file.name} <=="
    yield from text.splitlines()
