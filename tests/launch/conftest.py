"""Fixtures of the launcher's tests: folders, recipes, and a real Slurm cluster on this machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MINI_SLURM = Path(__file__).parent / "mini_slurm.sh"


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the user's own profiles, nor a job that the tests may run in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    for name in [*os.environ]:
        if name.startswith(("SLURM_JOB", "QATAPULT_")):
            monkeypatch.delenv(name)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until something is true.

    Raises:
        AssertionError: it did not become true in time.
    """
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def mini_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running cluster of two nodes; its folder. Only root can make one."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one host needs root, for namespaces")
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    environment = {**os.environ, "MINI_SLURM_DIR": str(folder)}
    subprocess.run([MINI_SLURM, "start"], env=environment, check=True, timeout=300)
    yield folder
    subprocess.run([MINI_SLURM, "stop"], env=environment, check=True, timeout=60)
