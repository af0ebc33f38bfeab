"""Whether ranks find each other, and how fast they reduce.

`torchrun … -m qatapult.launch.fabric [ANSWER.json]`: start it with one task a node under `srun` to check a
cluster's network (docs/slurm.md), or let `qatapult doctor --ranks N` start it on this machine.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

_MEGABYTES = 64
_REPEATS = 10
_TIMEOUT = timedelta(seconds=120)


def main() -> None:
    """Reduce a tensor several times; rank 0 prints the median, and writes it to a file where one is named.

    Raises:
        RuntimeError: the sum is not what it must be.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    values = torch.full((_MEGABYTES * 2**20 // 4,), float(rank + 1), device=device)
    seconds = []
    for _ in range(_REPEATS):
        reduced = values.clone()
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(reduced)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    expected = ranks * (ranks + 1) / 2
    if not bool((reduced == expected).all()):
        raise RuntimeError(f"rank {rank}: the sum over {ranks} ranks is {reduced[0].item()}, not {expected}")
    median = statistics.median(seconds)
    # Bus bandwidth as nccl-tests defines it: independent of the number of ranks for a perfect network.
    bus = 2 * (ranks - 1) / ranks * _MEGABYTES * 2**20 / median / 1e9
    answer = {
        "ranks": ranks,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "megabytes": _MEGABYTES,
        "milliseconds": 1e3 * median,
        "gigabytes_per_second": bus,
    }
    if rank == 0:
        print(json.dumps(answer), flush=True)
        if len(sys.argv) > 1:
            Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
