"""A run is a folder: its layout, and how its files are written so that nothing half-written is taken for whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("baseline", "ptq", "qat", "packed", "export", "report")


@dataclass(frozen=True)
class RunFolder:
    """Paths of `runs/<name>/` and access to what the stages left there."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def owner(self) -> Path:
        """Lock that names the process group that may write into the run."""
        return self.path / "owner.json"

    def stage(self, name: str) -> Path:
        """Result of a stage; it exists when the stage is finished."""
        return self.path / "stages" / f"{name}.json"

    def artifact(self, stage: str) -> Path:
        """Folder for the tensors that a stage hands to later ones."""
        return self.path / "stages" / stage

    def export(self, export_format: str) -> Path:
        return self.path / "export" / export_format

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def finished(self) -> list[str]:
        """Stages that are done, in order."""
        return [stage for stage in STAGES if self.stage(stage).exists()]

    def read_stage(self, name: str) -> dict[str, Any]:
        """Result of a finished stage."""
        return json.loads(self.stage(name).read_text(encoding="utf-8"))

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Lines of `metrics.jsonl`; a last line that a crash cut off is left out."""
        if not self.metrics.exists():
            return
        with self.metrics.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that readers see the old or the new content and a crash leaves no half.

    Args:
        path: the file; missing parents are created.
        text: its content, stored as UTF-8.
        mode: permission bits of the new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinities are refused: no other reader could parse them."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
