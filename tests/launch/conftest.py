"""Fixtures of the launcher's tests: folders, recipes, and a real Slurm cluster on this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WaitUntil = Callable[[Callable[[], object], float, str], None]
MINI_SLURM = Path(__file__).parent / "mini_slurm.sh"


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the user's own profiles, nor a job that the tests may run in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    for name in [*os.environ]:
        if name.startswith(("SLURM_JOB", "QATAPULT_")):
            monkeypatch.delenv(name)


@pytest.fixture
def wait_until() -> WaitUntil:
    """Poll until something is true; fail if it does not become true in time."""

    def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > give_up:
                pytest.fail(f"{what}: not within {seconds:g} s")
            time.sleep(0.2)

    return wait


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster; munge asks that everybody can reach its socket there."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one host needs root, for namespaces")
    with tempfile.TemporaryDirectory(prefix="mini-slurm-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def mini_slurm(cluster_folder: Path) -> Iterator[Path]:
    """A running cluster of two nodes; its folder."""
    folder = cluster_folder / "cluster"
    environment = {**os.environ, "MINI_SLURM_DIR": str(folder)}
    subprocess.run([MINI_SLURM, "start"], env=environment, check=True, timeout=300)
    try:
        yield folder
    finally:
        subprocess.run([MINI_SLURM, "stop"], env=environment, check=True, timeout=60)
