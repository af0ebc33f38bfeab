"""What the launcher keeps in a run folder, below `launch/`: how the run was submitted, and its attempts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from qatapult.launch.owner import check_folder_is_ours
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import differences, dump_recipe, load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder, write_atomically, write_json

Where = Literal["slurm", "local"]


@dataclass(frozen=True)
class Submission:
    """How a run was sent off the last time; `launch/submission.json`."""

    where: Where
    submitted: float = field(default_factory=time.time)
    job: str | None = None
    script: str | None = None
    job_log: str | None = None
    workdir: str = "."
    nodes: int = 1
    processes: int = 1
    at_once: int = 1
    profile: str | None = None
    profile_changes: tuple[str, ...] = ()
    engine: str | None = None
    cancelled: bool = False


@dataclass(frozen=True)
class LaunchFolder:
    """`runs/<name>/launch/`: the launcher's own files of a run."""

    run: RunFolder

    @property
    def path(self) -> Path:
        return self.run.path / "launch"

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    def rank_log(self, rank: int) -> Path:
        return self.run.logs / f"rank-{rank}.log"

    def outcome(self, attempt: str, rank: int) -> Path:
        """How a rank of an attempt ended."""
        return self.path / "outcomes" / f"{attempt}-rank-{rank}.json"

    @property
    def submission(self) -> Submission | None:
        try:
            raw = json.loads((self.path / "submission.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        known = {f.name for f in fields(Submission)}
        raw["profile_changes"] = tuple(raw.get("profile_changes", ()))
        return Submission(**{key: value for key, value in raw.items() if key in known})

    def write_submission(self, submission: Submission) -> None:
        write_json(self.path / "submission.json", asdict(submission))

    def read_attempts(self) -> list[dict[str, Any]]:
        """Lines of the attempt log, oldest first."""
        if not self.attempts.exists():
            return []
        with self.attempts.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]

    def append_attempt(self, line: dict[str, Any]) -> None:
        """Add a line to the attempt log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "time": time.time()}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def prepare_run(recipe: Recipe, runs: Path) -> LaunchFolder:
    """Make the run's folder and store the resolved recipe, which the job then runs.

    Raises:
        UserError: the folder is another user's, or holds a run of another recipe.
    """
    launch = LaunchFolder(RunFolder((runs / recipe.name).absolute()))
    check_run(recipe, launch.run)
    launch.run.logs.mkdir(parents=True, exist_ok=True)
    if not launch.run.recipe.exists():
        write_atomically(launch.run.recipe, dump_recipe(recipe))
    return launch


def check_run(recipe: Recipe, run: RunFolder) -> None:
    """Refuse to mix two recipes, or two users, in one run folder.

    Raises:
        UserError: with the first differences.
    """
    check_folder_is_ours(run.path)
    if not run.recipe.exists():
        return
    changed = differences(load_recipe(run.recipe), recipe)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"run {run.path} was started with another recipe ({'; '.join(changed[:3])}{more}); "
            "give this one another name, such as name=NEW"
        )


def find_run(name: str, runs: Path) -> LaunchFolder:
    """The run of that name, or at that path.

    Raises:
        UserError: there is none.
    """
    for folder in (runs / name, Path(name)):
        if (folder / "recipe.yaml").is_file():
            return LaunchFolder(RunFolder(folder.absolute()))
    known = ", ".join(sorted(launch.run.name for launch in all_runs(runs))[:8])
    raise UserError(f"there is no run {name!r} in {runs}" + (f"; there are {known}" if known else ""))


def all_runs(runs: Path) -> Iterator[LaunchFolder]:
    """Every run in a folder of runs."""
    if not runs.is_dir():
        return
    for folder in sorted(runs.iterdir()):
        if (folder / "recipe.yaml").is_file():
            yield LaunchFolder(RunFolder(folder.absolute()))
