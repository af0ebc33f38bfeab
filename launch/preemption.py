"""The notice that this process has to stop soon: SIGUSR1 (from the launcher, before a time limit) or SIGTERM.

A rank installs the handler first thing, before torch is imported, so that no notice is lost. The trainer asks
`requested()` at every step, agrees with the other ranks, checkpoints with them, and leaves with
`EXIT_REQUEUE`.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from qatapult.trainer.loop.interrupt import INTERRUPTED

# Exit status of a trainer that wrote a checkpoint and wants to go on in another attempt.
EXIT_REQUEUE = INTERRUPTED

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_notice: signal.Signals | None = None


def install() -> None:
    """Turn SIGUSR1 and SIGTERM into a notice instead of a death. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, _remember)


def requested() -> bool:
    """Whether this process has been told to stop. Other ranks may learn of it later."""
    return _notice is not None


def notice() -> str | None:
    """Name of the signal that came, such as `SIGUSR1`."""
    return _notice.name if _notice is not None else None


def _remember(number: int, frame: FrameType | None) -> None:
    global _notice
    _notice = signal.Signals(number)
