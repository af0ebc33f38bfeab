"""What a run ran on, for its report. No secrets: environment variables are not recorded."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qatapult.trainer.loop.engine import autocast_precision
from qatapult.trainer.measure import device_name
from qatapult.trainer.recipe.schema import Qat

_PACKAGES = (
    "qatapult", "torch", "transformers", "accelerate", "deepspeed", "triton", "compressed-tensors", "datasets", "wandb",
)  # fmt: skip


def describe_environment(accelerator: Accelerator, qat: Qat) -> dict[str, Any]:
    """Versions, device, engine and commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "engine": str(accelerator.distributed_type).rpartition(".")[2],
        "mixed_precision": autocast_precision(qat),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that the package was imported from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
