"""Wall time and peak memory of a stage."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class CostMeter:
    """Measures from its creation on: seconds, and the peak memory of this process's device."""

    device: torch.device

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_peak_resident_memory()

    def cost(self, tokens: int) -> dict[str, Any]:
        """The `cost` entry of a stage's result."""
        return {
            "seconds": round(time.perf_counter() - self._start, 3),
            "tokens": tokens,
            "peak_memory_bytes": peak_memory(self.device),
            "device": device_name(self.device),
        }


def add_costs(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two costs of one stage: seconds and tokens add up, of memory the higher peak counts."""
    return one | {
        "seconds": round(one["seconds"] + other["seconds"], 3),
        "tokens": one["tokens"] + other["tokens"],
        "peak_memory_bytes": max(one["peak_memory_bytes"], other["peak_memory_bytes"]),
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the last reset: allocated on a GPU, resident in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """What the work ran on: a GPU's name, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _reset_peak_resident_memory() -> None:
    """Linux forgets the peak when 5 is written here (proc(5)); elsewhere the peak is that of the whole process."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return
