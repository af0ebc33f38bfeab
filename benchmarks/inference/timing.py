"""Timers: CUDA graphs over buffers that are not in the cache, and interleaved medians on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]


def graph_time(
    call: Callable[[Any], object], buffers: Sequence[Any], budget_ms: float = 8.0, rounds: int = 3
) -> float:
    """Seconds of one call on the GPU, launch included: calls on all buffers are captured into one CUDA graph.

    Args:
        call: the operation.
        buffers: its argument, in copies that together exceed the second-level cache, so that each call finds
            its weight in memory.
        budget_ms: GPU time that a round may take.
        rounds: rounds of replays; the median counts.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(buffers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in buffers:
            call(buffer)
    graph.replay()
    once = _replay(graph, 1)
    replays = max(1, min(20, round(budget_ms * 1e-3 / max(once, 1e-6))))
    times = [_replay(graph, replays) for _ in range(rounds)]
    return statistics.median(times) / (replays * len(buffers))


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def cpu_times(calls: dict[str, Call], rounds: int = 7, least_seconds: float = 0.02) -> dict[str, float]:
    """Median seconds of each call; rounds go through all of them in turn, so that drift hits all alike."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(least_seconds / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: str, gigabytes: float = 4.0) -> float:
    """Bytes a second of the fastest large device-to-device copy, reads and writes counted.

    On a GPU: the driver's copy and a kernel's, outside of a graph (whose copy nodes were seen to be slower).
    """
    source = torch.empty(int(gigabytes * 2**28), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    if device != "cuda":
        seconds = cpu_times({"copy": lambda: target.copy_(source)})["copy"]
        return 8 * source.numel() / seconds
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return max(8 * source.numel() / stream_time(way) for way in ways)


def stream_time(call: Call, repeats: int = 8, rounds: int = 3) -> float:
    """Seconds of one call that is long enough for its launch not to matter; the fastest round counts."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(rounds):
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / repeats)
    return min(times)
