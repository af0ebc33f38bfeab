"""Losses of every engine against one process, a killed rank and resumption, on this machine's own devices.

    python benchmarks/training/engine_parity.py --out results [--engines ddp fsdp2 zero2 zero3] [--processes 2]

A tiny fp32 model (that of the tests) is trained by one process and by every engine; then one rank is killed with
SIGKILL in the middle of a run, which is started again, once on as many processes and once on half of them. The table
shows the largest relative difference of the losses: to one process, and of the resumed runs to the engine's whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from engine_launch import ENGINES, launch

from qatapult.trainer.plan.settings import Engine, Setting
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder

WORKER = Path(__file__).parents[2] / "tests" / "trainer" / "engine_worker.py"
# Weights alone are quantized: an activation between two codes flips with the last bit of a sum.
OVERRIDES = (
    "quantization.activations=null",
    "qat.optimizer.learning_rate=1e-5",
    "qat.tokens=7680",
    "qat.evaluate_every_tokens=7680",
    "qat.global_batch_tokens=256",
    "qat.checkpoints.every_tokens=512",
)
SECONDS = 150


def start(engine: Engine, processes: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start the worker; what it says is appended to `said.log` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # The worker sets up FSDP2 on gloo only where it is told the name.
    name = engine if not torch.cuda.is_available() and processes > 1 else "none"
    worker = [str(WORKER), str(folder), name, *OVERRIDES]
    setting = Setting(engine, "none", False, 2, "whole")
    recipe = load_recipe("tiny-random-w4a8", list(OVERRIDES))
    config = Path(tempfile.mkdtemp(prefix="engine-"))
    command, environment = launch(recipe, setting, processes, worker, config)
    with (folder / "said.log").open("ab") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)


def finish(process: subprocess.Popen[bytes], folder: Path) -> list[float]:
    """Losses of a run that ends well.

    Raises:
        RuntimeError: with the last line that names an error, if it does not.
    """
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code:
        lines = [
            line for line in (folder / "said.log").read_text(errors="replace").splitlines() if line.strip()
        ]
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        raise RuntimeError(f"exit {code}: {[*lines[-1:], *errors][-1].strip()[:200]}")
    return losses(folder)


def losses(folder: Path) -> list[float]:
    """The run's losses, step by step."""
    return [line["train/loss"] for line in RunFolder(folder).read_metrics() if "train/loss" in line]


def kill_a_rank(engine: Engine, processes: int, folder: Path) -> int:
    """Start a run, kill its last rank after some steps, and wait until the launcher has given up; the steps it made."""
    process = start(engine, processes, folder)
    deadline = time.monotonic() + SECONDS
    while len(losses(folder)) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    made = len(losses(folder))
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        try:
            if child.environ().get("RANK") == str(processes - 1):
                child.kill()
        except psutil.Error:
            continue
    try:
        process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return made


def examine(found: dict[str, Any], alone: list[float], scratch: Path, note: Callable[[], None]) -> None:
    """Everything about one engine; what fails is said in its field and the rest goes on.

    Args:
        found: names the engine and its processes; filled as results come in.
        alone: losses of one process.
        scratch: for the runs.
        note: called after every result.
    """
    engine, processes = found["engine"], found["processes"]
    whole: list[float] = []

    def attempt(field: str, workers: int, folder: Path, expected: list[float]) -> list[float]:
        try:
            got = finish(start(engine, workers, folder), folder)
        except RuntimeError as error:
            found[field] = str(error)
            return []
        complete = len(got) == len(expected)
        worst = (
            max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=False))
            if got and expected
            else None
        )
        found[field] = worst if complete else f"{len(got)} of {len(expected)} losses"
        note()
        return got

    whole = attempt("against_one", processes, scratch / engine, alone)
    killed = scratch / f"{engine}-killed"
    found["killed_after_steps"] = kill_a_rank(engine, processes, killed)
    found["steps"] = len(whole)
    shutil.copytree(killed, scratch / f"{engine}-half")
    attempt("resumed", processes, killed, whole)
    attempt("resumed_on_half", processes // 2, scratch / f"{engine}-half", whole)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| engine | processes | largest difference to one process | killed after | resumed | resumed on half |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [_shown(row.get(key)) for key in ("against_one", "resumed", "resumed_on_half")]
        killed = f"{row.get('killed_after_steps')} of {row.get('steps')} steps"
        lines.append(
            f"| {row['engine']} | {row['processes']} | {cells[0]} | {killed} | {cells[1]} | {cells[2]} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: float | str | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def main() -> None:
    """Examine the engines beside each other and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    writing = threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(options.engines)) as pool:
        scratch = Path(folder)
        alone = finish(start("single", 1, scratch / "alone"), scratch / "alone")
        print(f"one process: {len(alone)} losses", flush=True)
        rows: list[dict[str, Any]] = [
            {"engine": engine, "processes": options.processes} for engine in options.engines
        ]

        def note() -> None:
            with writing:
                (options.out / "parity.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
                (options.out / "parity.md").write_text(markdown(rows), encoding="utf-8")
                for log in scratch.glob("*/said.log"):
                    shutil.copy(log, options.out / f"parity_{log.parent.name}.log")

        futures = [pool.submit(examine, row, alone, scratch, note) for row in rows]
        for future in futures:
            future.result()
        note()
    print(markdown(rows))


if __name__ == "__main__":
    main()
