"""What an installation must not break."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_folder_kernels_at_the_root_does_not_break_transformers() -> None:
    done = run(
        "import transformers, kernels; from transformers import AutoModelForCausalLM; print(kernels.__file__)"
    )
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "qatapult").exists()


def test_the_command_line_starts_without_torch() -> None:
    done = run("import sys, qatapult.trainer.cli; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_kernels_import_needs_no_triton_and_no_gpu() -> None:
    code = "import sys; sys.modules['triton'] = None; from qatapult.kernels import Scheme, fake_quantize, packed_linear"
    assert run(code).returncode == 0


def test_launch_never_imports_torch() -> None:
    code = "import sys, pkgutil, importlib, qatapult.launch as l\n"
    code += (
        "[importlib.import_module(f'qatapult.launch.{m.name}') for m in pkgutil.iter_modules(l.__path__)]\n"
    )
    code += "print('torch' in sys.modules)"
    done = run(code)
    assert done.stdout.strip().endswith("False"), done.stderr
