"""SmolLM2-135M to W4A8 on 1, 2, 4 … GPUs: tokens and seconds to 95 % of round-to-nearest's loss, and scaling.

    python benchmarks/gpu/scaling.py --out results [--processes 1 2 4] [--tokens 307200]

Every run is `accelerate launch -m qatapult.trainer` with the same work on each GPU and step (8 × 512 tokens), so that
the batch grows with the GPUs. Baseline and calibration are computed by the first run and shared. Recovery is read off
the curve of the fake-quantized model; the last column is the packed model's at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from engine_launch import launch

from qatapult.trainer.plan.settings import Setting
from qatapult.trainer.recipe.loading import dump_recipe, load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.study.sharing import share_stages

TOKENS_A_PROCESS = 8 * 512
WANTED = 0.95


def recipe_of(processes: int, options: argparse.Namespace) -> Recipe:
    """The run on so many GPUs."""
    overrides = (
        f"name=scaling-{processes}",
        "data.evaluation_blocks=16",
        "ptq.calibration.blocks=64",
        "qat.batch_size=8",
        f"qat.global_batch_tokens={processes * TOKENS_A_PROCESS}",
        f"qat.tokens={options.tokens}",
        f"qat.evaluate_every_tokens={6 * TOKENS_A_PROCESS}",
        "qat.checkpoints.keep=1",
        "export=[]",
        *options.set,
    )
    return load_recipe("smollm2-135m-w4a8", list(overrides))


def run(recipe: Recipe, processes: int, options: argparse.Namespace) -> int:
    """Launch a run; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        worker = ["-m", "qatapult.trainer", str(file), "--runs", str(options.runs), "--quiet"]
        engine = "ddp" if processes > 1 else "single"
        setting = Setting(engine, "none", False, recipe.qat.batch_size, "whole")
        command, environment = launch(recipe, setting, processes, worker, Path(folder))
        with (options.out / f"{recipe.name}.log").open("w", encoding="utf-8") as said:
            return subprocess.run(command, env=environment, stdout=said, stderr=said, check=False).returncode


def read(folder: RunFolder, processes: int) -> dict[str, Any]:
    """What a run reached and when."""
    lines = list(folder.read_metrics())
    steps = [line for line in lines if "train/loss" in line]
    begun = steps[0]["time"] - 1 / max(steps[0]["train/tokens_per_second"], 1e-9) * steps[0]["tokens"]
    curve = [line for line in lines if "recovery/perplexity" in line]
    reached = next((line for line in curve if line["recovery/perplexity"] >= WANTED), None)
    report = json.loads(folder.report_json.read_text()) if folder.report_json.exists() else {}
    return {
        "processes": processes,
        "tokens_per_second": statistics.median(line["train/tokens_per_second"] for line in steps[2:]),
        "tokens_to_wanted": reached["tokens"] if reached else None,
        "seconds_to_wanted": reached["time"] - begun if reached else None,
        "curve": [(line["tokens"], line["time"] - begun, line["recovery/perplexity"]) for line in curve],
        "packed": report.get("metrics", {}).get("perplexity", {}).get("recovery"),
        "seconds": steps[-1]["time"] - begun,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| GPUs | tokens/s | of so many times one GPU | tokens to 95 % | seconds to 95 % | seconds in all | packed |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = (
            row["tokens_per_second"] / rows[0]["tokens_per_second"] * rows[0]["processes"] / row["processes"]
        )
        reached = ["not reached", "–"]
        if row["tokens_to_wanted"]:
            reached = [f"{row['tokens_to_wanted']:,}", f"{row['seconds_to_wanted']:.0f}"]
        packed = "–" if row["packed"] is None else f"{row['packed']:.1%}"
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            f"{share:.0%}",
            *reached,
            f"{row['seconds']:.0f}",
            packed,
        ]
        lines.append(f"| {row['processes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run with one GPU, then with more; the table is on disk after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/scaling"), help="folder of the runs")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="default: 1, 2, 4 … as many as there are GPUs"
    )
    parser.add_argument("--tokens", type=int, default=307_200)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of all runs")
    options = parser.parse_args()
    most = torch.cuda.device_count() or 2
    counts = options.processes or [2**n for n in range(10) if 2**n <= most]
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    done: list[tuple[RunFolder, Recipe]] = []
    for processes in counts:
        recipe = recipe_of(processes, options)
        folder = RunFolder(options.runs / recipe.name)
        share_stages(folder, recipe, done)
        status = run(recipe, processes, options)
        done.append((folder, recipe))
        print(f"{processes} processes: exit {status}", flush=True)
        if any("train/loss" in line for line in folder.read_metrics()):
            rows.append(read(folder, processes))
            (options.out / "scaling.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            (options.out / "scaling.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
