"""Room on the disk, asked for before work begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from qatapult.trainer.recipe.errors import UserError

#: Beside those that are kept there is the best one, and the one that is being written.
_MORE = 2


def checkpoints_bytes(model: nn.Module, keep: int) -> int:
    """Bytes of a run's checkpoints: fp32 weights and two Adam moments each.

    Args:
        model: of the student's shape; it may lie on the meta device.
        keep: `qat.checkpoints.keep`.
    """
    return 3 * 4 * sum(parameter.numel() for parameter in model.parameters()) * (keep + _MORE)


def require_disk_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what the disk has no room for; what lies in the folder already counts as room.

    Args:
        folder: of what will be written; it need not exist, and is not created.
        needed: bytes.
        what: needs them, and what could be changed: `("checkpoints (keep fewer: …)")`.

    Raises:
        UserError: naming the folder and both sizes.
    """
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free + held
    if free < needed:
        raise UserError(
            f"{folder}: {what} need about {_size(needed)} and {_size(free)} are free; "
            "free some space or choose another --runs folder"
        )


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
