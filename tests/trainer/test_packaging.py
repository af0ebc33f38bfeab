"""What an installation must not break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "trainer", "launch", "configs")
# What builds container images is used from a clone.
NOT_INSTALLED = {"launch/apptainer.def", "launch/install_image.sh"}


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


def test_a_regular_installation_has_everything(tmp_path: Path) -> None:
    """The wheel alone, away from the repository: code, recipes, templates and C++ sources."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "site", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    assert str(tmp_path / "site") in python("-c", "import qatapult.kernels as k; print(k.__file__)")
    assert "smollm2-135m-w4a8" in python("-m", "qatapult.trainer.cli", "recipe", "list")
    assert files_below(source) - files_below(tmp_path / "site/qatapult") <= NOT_INSTALLED


def files_below(root: Path) -> set[str]:
    files = (file for room in ROOMS for file in (root / room).rglob("*.*"))
    return {str(file.relative_to(root)) for file in files if "__pycache__" not in file.parts}
