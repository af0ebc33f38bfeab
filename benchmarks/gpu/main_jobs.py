"""The main job and the table of formats as parallel runs on the GPUs: SmolLM2-135M, 614,400 tokens a run.

    python benchmarks/gpu/main_jobs.py --out results [--minutes 5] [--parallel 9] [--only w4a8 w2a16-g64]
    python benchmarks/gpu/main_jobs.py --out results --only w4a8 --tokens 2560 --set model.source=random:tiny

Each run is a `qatapult train RECIPE`, from GPTQ where the recipe has it; the model is so small that one process waits
for Python most of the time, so that many of them share a card. What is not done after `--minutes` is stopped and shown
as far as it came (0 only converts the model). `jobs.json` and `jobs.md` hold the perplexity of the packed model, what
was recovered, and seconds. Wall times are those of runs beside each other, not of a run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from qatapult.trainer.models import load_tokenizer, local_source
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.report.summary import summarize
from qatapult.trainer.run_folder import RunFolder

#: The table's rows: name of the recipe after `smollm2-135m-`, and what is special about the run here.
JOBS: dict[str, tuple[str, ...]] = {
    "w4a8": ("qat.evaluate_every_tokens=102400",),
    "w2a16-g64": ("qat.evaluate_every_tokens=102400",),
    "w4a16-g64": (),
    "w3a16-g64": (),
    "w8a8": (),
    "ternary": (),
    "binary": (),
    "w4a8-mixed": (),
}
COMMON = (
    "qat.batch_size=8",
    "qat.global_batch_tokens=4096",
    "data.evaluation_blocks=16",
    "ptq.calibration.blocks=64",
    "qat.checkpoints.keep=1",
    "qat.evaluate_every_tokens=1000000000",
    "export=[]",
)


@dataclass
class Job:
    """A run in a process group of its own."""

    name: str
    folder: RunFolder
    process: subprocess.Popen[str]
    log: TextIO
    started: float
    seconds: float | None = None

    def poll(self) -> bool:
        """Whether it has ended; the first time this is seen its time is taken."""
        if self.process.poll() is None:
            return False
        if self.seconds is None:
            self.seconds = time.monotonic() - self.started
            print(f"{self.name}: exit {self.process.returncode} after {self.seconds:.0f} s", flush=True)
            self.log.close()
        return True

    def stop(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(name: str, gpu: int, options: argparse.Namespace) -> Job:
    """Start `qatapult train` of one row on a GPU; what it says goes into a file beside the summary."""
    log = (options.out / f"{name}.log").open("w", encoding="utf-8")
    command = [sys.executable, "-m", "qatapult.trainer.cli", "train", f"smollm2-135m-{name}", f"name={name}"]
    command += [
        *COMMON,
        *JOBS[name],
        f"qat.tokens={options.tokens}",
        *options.set,
        "--runs",
        str(options.runs),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": str(options.threads)},
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Job(name, RunFolder(options.runs / name), process, log, time.monotonic())


def run_all(options: argparse.Namespace) -> None:
    """At most `--parallel` at a time, in the order of the table, until all are done or the time is up.

    The summary is written every so often, so that it is there whatever happens.
    """
    deadline, collected = time.monotonic() + 60 * options.minutes, 0.0
    waiting, gpus = list(options.only), max(1, torch.cuda.device_count())
    jobs: list[Job] = []
    try:
        while time.monotonic() < deadline:
            running = [job for job in jobs if not job.poll()]
            if not waiting and not running:
                break
            if waiting and len(running) < options.parallel:
                jobs.append(start(waiting.pop(0), len(jobs) % gpus, options))
            if time.monotonic() - collected > 20:
                collect(jobs, options.out)
                collected = time.monotonic()
            time.sleep(0.2)
    finally:
        for job in jobs:
            job.stop()
            job.poll()
        collect(jobs, options.out)


def collect(jobs: list[Job], out: Path) -> None:
    """Write `jobs.json` and `jobs.md` of the runs as they are."""
    rows = [row(job) for job in jobs]
    (out / "jobs.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (out / "jobs.md").write_text(markdown(rows), encoding="utf-8")


def row(job: Job) -> dict[str, Any]:
    """What a run reached, finished or not."""
    result: dict[str, Any] = {"job": job.name, "exit": job.process.returncode, "wall_seconds": job.seconds}
    if not job.folder.recipe.exists():
        return result
    report = summarize(job.folder)
    steps = [line for line in job.folder.read_metrics() if "train/loss" in line]
    return result | {
        "format": report["format"],
        "finished": report["finished"],
        "perplexity": {k: v for k, v in report["metrics"].get("perplexity", {}).items() if k != "documents"},
        "curve": report["curve"],
        "tokens": steps[-1]["tokens"] if steps else 0,
        "tokens_per_second": sum(line["train/tokens_per_second"] for line in steps[2:])
        / max(1, len(steps) - 2),
        "cost": report["cost"],
        "bytes": report["bytes"],
        "kernels": report["kernels"],
        "parity": report["parity"],
        "environment": report["environment"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the runs."""
    columns = [
        "run",
        "format",
        "full",
        "RTN",
        "best PTQ",
        "packed",
        "÷ full",
        "of RTN's loss",
        "of RTN's loss, log",
    ]
    columns += ["of best PTQ's loss", "tokens", "s in QAT", "s in all", "exit"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for found in rows:
        metric = found.get("perplexity", {})
        packed, full = metric.get("packed"), metric.get("full_precision")
        best = f"{_number(metric.get('best_ptq'))} ({metric.get('best_ptq_method')})"
        qat = found.get("cost", {}).get("qat", {}).get("seconds")
        cells = [found["job"], found.get("format", ""), _number(full), _number(metric.get("ptq")), best]
        cells += [_number(packed), _number(packed / full if packed and full else None)]
        cells += [_percent(metric.get(key)) for key in ("recovery", "recovery_log", "recovery_from_best_ptq")]
        cells += [
            f"{found.get('tokens', 0):,}",
            _number(qat),
            _number(found["wall_seconds"]),
            str(found["exit"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def main() -> None:
    """Run, collect, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the summary")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/main_jobs"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=614_400, help="of each run")
    parser.add_argument("--threads", type=int, default=4, help="of each run on the processor")
    parser.add_argument("--parallel", type=int, default=len(JOBS))
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of all runs")
    options = parser.parse_args()
    # Once, before all of them want it: a GGUF file is converted at its first use.
    recipe = load_recipe(f"smollm2-135m-{options.only[0]}", options.set)
    if not recipe.model.source.startswith("random:"):
        local_source(recipe.model)
        load_tokenizer(recipe.model)
    if options.minutes:
        options.out.mkdir(parents=True, exist_ok=True)
        # A limit from outside is no reason to lose what was measured.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_all(options)
        print((options.out / "jobs.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
