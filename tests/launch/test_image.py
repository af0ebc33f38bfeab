"""The container image, as far as it can be checked without a daemon: linted, and its own install step run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copied_by_dockerfile() -> list[str]:
    """Sources of the build stage's COPY lines."""
    sources: list[str] = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            sources += line.split()[1:-1]
    return sources


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_image_and_definition_are_built_from_the_same_parts() -> None:
    named = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    dockerfile = {source.partition("/")[0] for source in copied_by_dockerfile()}
    definition = (ROOT / "launch" / "apptainer.def").read_text()
    apptainer = set(re.findall(r"^    (\S+) /build/\S+$", definition, re.MULTILINE))
    assert dockerfile == named == apptainer
    [base] = re.findall(r"PYTHON_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text())
    assert f"From: {base}\n" in definition


def test_the_image_runs_as_nobody_special_and_pins_its_base() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    assert re.search(r"^USER (?!0)\d+$", stages[-1], re.MULTILINE)
    assert re.search(r"PYTHON_IMAGE=python:\d+\.\d+\.\d+-", stages[0])
    assert "g++" not in "\n".join(line for line in stages[-1].splitlines() if not line.startswith("#"))


def test_what_the_image_copies_is_enough_to_install_and_to_submit(tmp_path: Path) -> None:
    """The `project` step of the image's own script, on the image's own build context."""
    context, venv = tmp_path / "build", tmp_path / "venv"
    skipped = shutil.ignore_patterns("__pycache__")
    for source in copied_by_dockerfile():
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=skipped, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, target)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    # A fresh environment of Python 3.11 has a setuptools that is older than the build asks for.
    subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True, timeout=60
    )
    # The dependencies come from the environment of the tests: a path in a .pth file does not read the .pth
    # files of that folder, so the editable install there is not seen.
    [packages] = (venv / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        ["launch/install_image.sh", "project", venv],
        cwd=context,
        check=True,
        timeout=200,
        capture_output=True,
    )

    environment = {**os.environ, "PYTHONPATH": "", "XDG_CONFIG_HOME": str(tmp_path)}

    def qatapult(*words: str) -> str:
        done = subprocess.run(
            [venv / "bin" / "qatapult", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "#SBATCH --nodes=4" in qatapult("submit", "smollm2-135m-w4a8", "--nodes", "4", "--dry-run")
    assert {"python", "torch"} <= {
        finding["name"] for finding in json.loads(qatapult("doctor", "--quick", "--json"))
    }
