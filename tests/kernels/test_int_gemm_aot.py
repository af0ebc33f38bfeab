"""Shipped configurations compile without a GPU, to integer tensor cores and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from qatapult.kernels.common.aot import reports_of

KINDS = ("W4A8 channel 64×16", "W4A8 g128 128×128")
#: One process for all, since Triton cannot compile in one that interprets.
COMPILE = """
import json, sys
from qatapult.kernels.common.aot import compile_case
from qatapult.kernels.int_gemm.shipped import aot_cases
chosen = [next(case for case in aot_cases() if case.name.startswith(kind)) for kind in sys.argv[1:]]
reports = [compile_case(case, capability) for case in chosen for capability in (80, 90)]
fields = [[r.name, r.capability, r.stack_bytes, "IMMA" in r.sass, "IGMMA" in r.sass] for r in reports]
print(json.dumps(fields))
"""


def test_decode_and_prefill_use_integer_tensor_cores() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    reports = json.loads(done.stdout)
    assert len(reports) == 2 * len(KINDS)
    for name, capability, stack_bytes, imma, igmma in reports:
        assert stack_bytes == 0, name
        assert igmma if capability == 90 else imma, f"{name} on sm_{capability}"


@pytest.mark.slow
def test_every_shipped_configuration_compiles_without_spills() -> None:
    for report in reports_of("qatapult.kernels.int_gemm.shipped"):
        assert report.stack_bytes == 0, report.name
        if "one token" in report.name:
            assert "IDP.4A" in report.sass, report.name
            continue
        integer = "A8" in report.name
        wanted = (
            ("IGMMA" if integer else "HGMMA") if report.capability == 90 else ("IMMA" if integer else "HMMA")
        )
        assert wanted in report.sass, f"{report.name} on sm_{report.capability} has no {wanted}"
