"""The queue of one machine, with the real trainer and a small random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

WaitUntil = Callable[[Callable[[], object], float, str], None]
pytestmark = pytest.mark.timeout(900)
PATIENCE = 400


def qatapult(runs: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatapult.trainer.cli", *words, "--runs", str(runs)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 or not check, done.stderr
    return done


def states(runs: Path) -> dict[str, dict[str, Any]]:
    return {state["name"]: state for state in json.loads(qatapult(runs, "runs", "--json").stdout)}


def processes(runs: Path) -> list[psutil.Process]:
    """The queue and the ranks of a folder of runs."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(runs) in " ".join(process.info["cmdline"] or [])
        and "qatapult.launch." in " ".join(process.info["cmdline"])
    ]


@pytest.mark.slow
def test_the_queue_runs_one_at_a_time_and_survives_a_power_cut(tmp_path: Path, wait_until: WaitUntil) -> None:
    runs = tmp_path / "my runs"
    for name in ("first", "second"):
        qatapult(
            runs,
            "submit",
            "tiny-random-w4a8",
            f"name={name}",
            "qat.tokens=12800",
            "--local",
            "--at-once",
            "1",
        )
    assert (
        "already"
        in qatapult(
            runs, "submit", "tiny-random-w4a8", "name=first", "qat.tokens=12800", "--local", check=False
        ).stderr
    )
    metrics = runs / "first" / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("train/loss") >= 3, PATIENCE, "first trains"
    )
    now = states(runs)
    assert (now["first"]["state"], now["second"]["state"]) == ("running", "queued")

    for process in processes(runs):
        process.kill()
    wait_until(lambda: not processes(runs), 30, "everything is dead")
    assert states(runs)["first"]["state"] == "stopped"

    assert "first, second" in qatapult(runs, "resume").stdout
    together = 0
    while not all((runs / name / "stages" / "report.json").exists() for name in ("first", "second")):
        now = states(runs)
        assert "failed" not in [state["state"] for state in now.values()]
        together = max(together, sum(state["state"] == "running" for state in now.values()))
    assert together == 1
    ends = [
        line["how"]
        for line in json.loads(qatapult(runs, "status", "first", "--json").stdout)["history"]
        if line["event"] == "end"
    ]
    wait_until(lambda: not processes(runs), 60, "the queue leaves")
    assert ends[0] == "died"
    losses = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in losses if "train/loss" in line] == list(range(1, 101))


def test_cancel_takes_a_run_out_of_the_queue_and_resume_puts_it_back(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    runs = tmp_path / "runs"
    for name in ("busy", "waiting"):
        words = (
            "submit",
            "tiny-random-w4a8",
            f"name={name}",
            "qat.tokens=1280000",
            "--local",
            "--processes",
            "2",
        )
        qatapult(runs, *words)
    qatapult(runs, "cancel", "waiting")
    assert states(runs)["waiting"]["state"] == "cancelled"
    metrics = runs / "busy" / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("train/loss") >= 2, PATIENCE, "busy trains"
    )
    qatapult(runs, "cancel", "busy")
    wait_until(lambda: not processes(runs), PATIENCE, "the ranks checkpoint and leave, and so does the queue")
    assert list((runs / "busy" / "checkpoints").glob("step-*"))
    now = states(runs)
    assert {state["state"] for state in now.values()} == {"cancelled"}
    assert now["waiting"]["attempts"] == 0
    qatapult(runs, "resume", "waiting")
    assert states(runs)["waiting"]["state"] in ("queued", "running")
    for process in processes(runs):
        process.kill()
