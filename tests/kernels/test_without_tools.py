"""Importing needs nothing; without a compiler and without Triton the operators run in plain torch."""

from __future__ import annotations

import os
import subprocess
import sys

BARE = """
import sys, warnings
sys.modules["triton"] = None
import qatapult.kernels as kernels
assert "torch" not in sys.modules, "importing the package must cost nothing"
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    weight = torch.randn(4, 8, requires_grad=True)
    scheme = kernels.Scheme(bits=4)
    scale, _ = kernels.choose_range(weight, scheme)
    for _ in range(2):
        kernels.fake_quantize(weight, scale, scheme=scheme).sum().backward()
messages = [str(entry.message) for entry in caught if "could not be compiled" in str(entry.message)]
assert len(messages) == 1 and "fake_quant.cpp" in messages[0], messages
"""


def test_no_compiler_and_no_triton() -> None:
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", BARE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
