"""Shipped configurations compile for the A100 and the H100 without a GPU, to integer tensor cores and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from qatapult.kernels.common.aot import reports_of

ONE_KIND = """
import json, sys
from qatapult.kernels.common.aot import compile_case
from qatapult.kernels.int_gemm.shipped import aot_cases
case = next(case for case in aot_cases() if case.name.startswith(sys.argv[1]))
report = compile_case(case, int(sys.argv[2]))
print(json.dumps([report.stack_bytes, "IMMA" in report.sass, "IGMMA" in report.sass, report.name]))
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["W4A8 channel 64×16", "W4A8 g128 128×128"])
def test_decode_and_prefill_use_integer_tensor_cores(kind: str, capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ONE_KIND, kind, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stack_bytes, imma, igmma, _ = json.loads(done.stdout)
    assert stack_bytes == 0
    assert (igmma if capability == 90 else imma) is True


@pytest.mark.slow
def test_every_shipped_configuration_compiles_without_spills() -> None:
    for report in reports_of("qatapult.kernels.int_gemm.shipped"):
        assert report.stack_bytes == 0, report.name
        integer = "A8" in report.name
        wanted = ("IGMMA" if integer else "HGMMA") if report.capability == 90 else ("IMMA" if integer else "HMMA")
        assert wanted in report.sass, f"{report.name} on sm_{report.capability} has no {wanted}"
