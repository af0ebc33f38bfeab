"""Ctrl-C, SIGTERM and Slurm's SIGUSR1 ask for a checkpoint and an orderly end."""

from __future__ import annotations

import signal
from types import FrameType

#: Exit status of a run that was interrupted, wrote a checkpoint and can go on.
INTERRUPTED = 85


class Interrupted(Exception):
    """The run wrote a checkpoint and stopped because it was asked to."""


class InterruptFlag:
    """Remembers that a signal came. A second Ctrl-C ends the process at once.

    Flags nest: an inner one knows of a signal that came to the outer one before, and hands on what it received.
    A launched rank enters one before anything heavy is imported, so that no notice is lost.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._outer: InterruptFlag | None = None

    def __enter__(self) -> InterruptFlag:
        self._outer = current_flag()
        self.received = self._outer.received if self._outer is not None else None
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._outer is not None:
            self._outer.received = self._outer.received or self.received

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def current_flag() -> InterruptFlag | None:
    """The innermost flag that is entered, if any."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, InterruptFlag) else None
