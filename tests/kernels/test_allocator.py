"""What glibc's malloc does with freed tensors; in a process of its own, as the setting is the process's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A tensor that stays above them in the heap keeps freed ones from going back by themselves.
PROGRAM = """
import torch
from qatapult.kernels.common.allocator import return_freed_memory

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

if {returns}:
    return_freed_memory()
torch.ones(2**22)  # the first of a size to be freed: by default its like come from the heap from now on
freed, kept = [torch.ones(2**21) for _ in range(8)], torch.ones(2**21)
before = resident()
del freed
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("returns", [False, True])
def test_freed_tensors_go_back_to_the_system(returns: bool) -> None:
    program = PROGRAM.format(returns=returns)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    share = int(done.stdout) / (8 * 2**21 * 4)
    assert (share > 0.9) if returns else (share < 0.1)
