"""`insight.json` part by part: what was measured is kept, and the same command goes on with the next part."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qatapult.trainer.run_folder import RunFolder, write_json

FILE = "insight.json"


def question(run: RunFolder, tokens: int, rise: float) -> dict[str, Any]:
    """What the figures depend on; with another answer to it they are measured again."""
    trained = hashlib.sha256(run.stage("qat").read_bytes()).hexdigest()[:16]
    return {"training": trained, "tokens": tokens, "rise": rise}


def stored(run: RunFolder, asked: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call measured of the same question; empty if there is nothing, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(_file(run).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("question") == asked else {}


def save(run: RunFolder, result: dict[str, Any]) -> None:
    """Write the parts measured so far, atomically."""
    write_json(_file(run), result)


def added_cost(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Cost of several calls: seconds add up, the peak is the highest."""
    if before is None:
        return now
    peak = max(before["peak_memory_bytes"], now["peak_memory_bytes"])
    return {**now, "seconds": round(before["seconds"] + now["seconds"], 3), "peak_memory_bytes": peak}


def _file(run: RunFolder) -> Path:
    return run.path / FILE
