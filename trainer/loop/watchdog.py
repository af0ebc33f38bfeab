"""Notices a process that hangs, and names it."""

from __future__ import annotations

import faulthandler
import socket
import sys
import threading
import time


class Watchdog:
    """Says on standard error which process made no step for too long, and where it stands.

    It does not end the process: a slow file system is no reason to lose a run, and a collective that will never
    return ends at the process group's own timeout.

    Args:
        timeout: seconds without a beat.
        rank: this process.
    """

    def __init__(self, timeout: float, rank: int) -> None:
        self.timeout = timeout
        self.rank = rank
        self.warnings = 0
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self) -> None:
        """Tell that this process is alive."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(self.timeout / 4, 30)):
            silent = time.monotonic() - self._last
            if silent < self.timeout:
                continue
            self.warnings += 1
            print(
                f"qatapult: rank {self.rank} on {socket.gethostname()} has made no step for {silent:.0f} s "
                "(qat.guards.hang_timeout); it stands at:",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
            self.beat()
