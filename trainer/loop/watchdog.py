"""Notices a process that hangs or falls behind, and names it.

Where one process stops, all others soon wait for it in a collective, and every one of them looks alike from inside. So
each counts the places that it passes in the training loop and publishes the count in the process group's store: the
process to look at is the one that passed the fewest.
"""

from __future__ import annotations

import faulthandler
import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

_LONGEST_INTERVAL = 30.0


@dataclass(frozen=True)
class Pulse:
    """How far a process got.

    Attributes:
        rank: the process.
        host: its node.
        passed: places passed since training began.
        place: the last one.
    """

    rank: int
    host: str
    passed: int
    place: str


class Watchdog:
    """Says on standard error which process holds up the others for too long, and where it stands.

    It does not end the process: a slow file system is no reason to lose a run, and a collective that will never
    return ends at the process group's own timeout.

    Args:
        timeout: seconds without passing a place.
        rank: this process.
        world_size: number of processes.
        store: where processes publish how far they got (a `torch.distributed.Store`); None for one process.
    """

    def __init__(self, timeout: float, rank: int, world_size: int = 1, store: Any = None) -> None:
        self.timeout = timeout
        self.rank = rank
        self.warnings = 0
        self._world_size = world_size
        self._store = store
        self._pulse = Pulse(rank, socket.gethostname(), 0, "the start")
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

    def beat(self, place: str = "a step") -> None:
        """Tell that this process is alive.

        Args:
            place: what it does next; all processes pass the same places in the same order.
        """
        self._last = time.monotonic()
        self._pulse = Pulse(self.rank, self._pulse.host, self._pulse.passed + 1, place)

    def _watch(self) -> None:
        while not self._stop.wait(min(self.timeout / 4, _LONGEST_INTERVAL)):
            self._publish()
            silent = time.monotonic() - self._last
            if silent >= self.timeout:
                self.warnings += 1
                self._report(silent)
                self._last = time.monotonic()

    def _publish(self) -> None:
        if self._store is None:
            return
        try:
            self._store.set(_key(self.rank), json.dumps(asdict(self._pulse)))
        except RuntimeError:  # its host is gone, and the launcher will end this process too
            self._store = None

    def _report(self, silent: float) -> None:
        behind, others = split(self._pulses())
        if self._pulse.rank in {pulse.rank for pulse in behind}:
            text = f"qatapult: {describe(behind, others, silent)}; rank {self.rank} stands at:"
            print(text, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        elif self._pulse.rank == min(pulse.rank for pulse in others):
            print(f"qatapult: {describe(behind, others, silent)}", file=sys.stderr, flush=True)

    def _pulses(self) -> list[Pulse]:
        """What all processes published; this one's as it is now."""
        pulses = [self._pulse]
        for rank in range(self._world_size):
            if self._store is not None and rank != self.rank and self._store.check([_key(rank)]):
                pulses.append(Pulse(**json.loads(self._store.get(_key(rank)))))
        return pulses


def split(pulses: Sequence[Pulse]) -> tuple[list[Pulse], list[Pulse]]:
    """The processes that passed the fewest places, and the others."""
    fewest = min(pulse.passed for pulse in pulses)
    ordered = sorted(pulses, key=lambda pulse: pulse.rank)
    return [p for p in ordered if p.passed == fewest], [p for p in ordered if p.passed > fewest]


def describe(behind: Sequence[Pulse], others: Sequence[Pulse], silent: float) -> str:
    """One line: who holds up whom."""
    names = ", ".join(f"rank {pulse.rank} on {pulse.host}" for pulse in behind[:4])
    names += f" and {len(behind) - 4} more" * (len(behind) > 4)
    since = f"for {silent:.0f} s (qat.guards.hang_timeout)"
    if not others:
        return f"{names}: no progress {since}, at {behind[0].place}"
    waiting = f"{len(others)} other{'s' * (len(others) > 1)} wait{'s' * (len(others) == 1)}"
    return f"{names} hangs or falls behind, at {behind[0].place}; {waiting}, at {others[0].place}, {since}"


def process_store() -> Any:
    """A connection of its own to the process group's store, for a thread; None for one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore("qatapult-watchdog", store.clone())


def _key(rank: int) -> str:
    return f"pulse-{rank}"
