"""States of all runs in a folder, kept fresh in the background so that no request waits for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from qatapult.launch.folder import LaunchFolder, all_runs
from qatapult.launch.state import describe
from qatapult.trainer.report.summary import describe_format

#: Seconds between two looks at the folder; a run whose files have not changed is looked at again after the
#: longer time.
_INTERVAL, _UNCHANGED = 2.0, 30.0
#: Runs described at a time: the first page of a large folder fills up while the rest is read.
_BATCH = 20


class Overview:
    """Watches a folder of runs.

    Args:
        runs: the folder.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._rows: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, tuple[tuple[int, ...], float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        """Watch in a thread until `stop`."""
        threading.Thread(target=self._watch, name="overview", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def rows(self) -> list[dict[str, Any]]:
        """One row a run, by name: the fields of `launch.state.RunState`, `format` and `report`."""
        with self._lock:
            return [self._rows[name] for name in sorted(self._rows)]

    def find(self, name: str) -> LaunchFolder | None:
        """The run of that name, if the folder has it; a name is never used as a path."""
        return next((launch for launch in all_runs(self.runs) if launch.run.name == name), None)

    def refresh(self) -> None:
        """Look at the folder once."""
        launches = list(all_runs(self.runs))
        stale = [launch for launch in launches if self._is_stale(launch)]
        for first in range(0, len(stale), _BATCH):
            batch = stale[first : first + _BATCH]
            marks = {launch.run.name: (_fingerprint(launch), time.monotonic()) for launch in batch}
            rows = {
                launch.run.name: _row(launch, state)
                for launch, state in zip(batch, describe(batch), strict=True)
            }
            with self._lock:
                self._rows.update(rows)
                self._seen.update(marks)
        with self._lock:
            for gone in self._rows.keys() - {launch.run.name for launch in launches}:
                del self._rows[gone], self._seen[gone]

    def _is_stale(self, launch: LaunchFolder) -> bool:
        fingerprint, looked = self._seen.get(launch.run.name, ((), 0.0))
        if _fingerprint(launch) != fingerprint:
            return True
        finished = self._rows[launch.run.name]["state"] == "finished"
        return not finished and time.monotonic() - looked > _UNCHANGED

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.refresh()
            self._stop.wait(_INTERVAL)


def _fingerprint(launch: LaunchFolder) -> tuple[int, ...]:
    """When the files that a row is made of last changed."""
    run = launch.run
    files = (run.recipe, run.metrics, run.path / "stages", run.report_json, run.path / "launch")
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def _row(launch: LaunchFolder, state: Any) -> dict[str, Any]:
    import yaml

    recipe = yaml.load(launch.run.recipe.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return {
        **{key: value for key, value in state.as_json().items() if key != "folder"},
        "format": describe_format(recipe.get("quantization") or {}),
        "report": launch.run.report_html.exists(),
    }
