"""The distributed run on this machine: speed, memory against the plan, where the time goes, and scaling, by engine.

    python benchmarks/training/distributed.py --out results                        # all GPUs; LLaMA-2-7B with 12 layers
    python benchmarks/training/distributed.py --engines fsdp2 --layers 32 --batch 2 --no-single --out whole_7b
    python benchmarks/training/distributed.py --shape tiny --layers 2 --block-size 64 --out results   # a CPU

One command starts every run, by `accelerate launch` with the configuration that `qatapult plan --write` gives (on
a CPU by torchrun, with gloo). Each is W4A8 distillation of a model with random weights on random tokens, the same work
on every GPU: DDP, FSDP2, ZeRO-2 and ZeRO-3 on 2, 4, 8 … processes beside one process alone, and FSDP2 once more with
cached top-64 logits in place of the teacher. Shares: loader and teacher by clocks in the loop, communication and
fake-quantization by the profiler, on the main process; `exposed` is communication that no other kernel hides.
Losses, kills and resumption: `engine_parity.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_launch import ENGINES, launch, node
from large_model import HOPPER_BF16, distillation_recipe, model_flops, source_with_layers

from qatapult.trainer.measure import device_name
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.memory import memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.settings import Engine, Setting, Teacher
from qatapult.trainer.recipe.schema import Recipe

WORKER = Path(__file__).with_name("distributed_worker.py")


@dataclass(frozen=True)
class Run:
    """An engine on so many processes."""

    engine: Engine
    processes: int
    teacher: Teacher

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.processes}" + ("-cached" if self.teacher == "cached" else "")


def runs(options: argparse.Namespace) -> list[Run]:
    """What is to be measured, one process first."""
    found = [Run("single", 1, "whole")] if options.single else []
    for processes in options.processes:
        for engine in options.engines:
            found.append(Run(engine, processes, "sharded" if engine in ("zero3", "fsdp2") else "whole"))
        if options.cached:
            found.append(Run("fsdp2", processes, "cached"))
    return found


def recipe_of(options: argparse.Namespace, processes: int) -> Recipe:
    """The run's recipe, as the worker has it."""
    source = source_with_layers(options.shape, options.layers)
    return distillation_recipe(
        source, options.block_size, options.batch, processes, gradient_checkpointing=options.checkpointing
    )


def execute(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Start a run and read what it measured; where it failed, the last lines of what it said."""
    recipe = recipe_of(options, run.processes)
    setting = Setting(run.engine, "none", options.checkpointing, options.batch, run.teacher)
    shape, cluster = shape_of(recipe.model), parse_cluster(node(run.processes))
    needs = memory(recipe, shape, cluster, setting)
    on_gpu = torch.cuda.is_available()
    planned = {
        "run": run.name,
        "engine": run.engine,
        "processes": run.processes,
        "teacher": run.teacher,
        # The allocator, which is what is measured on a GPU, does not know of the driver's own memory.
        "predicted_bytes": needs.device - (needs.runtime if on_gpu else 0.0),
        "teacher_bytes": shape.parameters * (2 if on_gpu else 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.json", Path(folder) / "result.json"
        wanted = ("shape", "layers", "block_size", "batch", "checkpointing", "steps")
        table = options.out / f"profile_{run.name}.txt"
        given = {key: getattr(options, key) for key in wanted}
        given |= {
            "engine": run.engine,
            "teacher": run.teacher,
            "table": str(table),
            "cache": f"{folder}/cache",
        }
        settings.write_text(json.dumps(given), encoding="utf-8")
        worker = [str(WORKER), str(settings), str(result)]
        command, environment = launch(recipe, setting, run.processes, worker, Path(folder))
        log = options.out / f"{run.name}.log"
        with log.open("w", encoding="utf-8") as said:
            try:
                done = subprocess.run(
                    command, env=environment, stdout=said, stderr=said, timeout=options.timeout, check=False
                )
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = 124
        if code or not result.exists():
            return planned | {"failed": f"exit {code}: {reason(log)}"}
        measured = json.loads(result.read_text(encoding="utf-8"))
        return planned | {**measured, "engine_used": measured["engine"], "engine": run.engine}


def reason(log: Path) -> str:
    """The last line that names an error."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return [*(lines or ["no message"]), *errors][-1][:300]


def summary(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures, with utilization and scaling worked out."""
    shape = shape_of(recipe_of(options, 1).model)
    alone = next((one for one in results if one["processes"] == 1 and "failed" not in one), None)
    for one in results:
        if "failed" in one:
            continue
        speed = one["tokens_per_second_per_process"]
        flops = speed * model_flops(shape, options.block_size, one["teacher"] != "cached")
        one |= {
            "utilization": flops / HOPPER_BF16,
            "plan_over_measured": one["predicted_bytes"] / one["peak_bytes"],
        }
        if alone is not None:
            one["efficiency"] = speed / alone["tokens_per_second_per_process"]
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
        "shape": options.shape,
        "layers": options.layers,
        "parameters": shape.parameters,
        "block_size": options.block_size,
        "batch": options.batch,
        "gradient_checkpointing": options.checkpointing,
        "runs": results,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    recomputing = "on" if found["gradient_checkpointing"] else "off"
    lines = [
        f"{found['device']}, torch {found['torch']}: {found['shape']} with {found['layers']} layers "
        f"({found['parameters'] / 1e9:.2f} billion weights), {found['batch']} × {found['block_size']} tokens a process "
        f"and step, W4A8 per channel, gradient checkpointing {recomputing}",
        "",
        "| run | s a step | tokens/s a GPU | of 989 TFLOP/s | against one | peak GB | plan GB | plan ÷ peak "
        "| teacher GB held | of | loader | teacher | communication | exposed | fake-quantization |",
        "|---|" + "---:|" * 14,
    ]
    for one in found["runs"]:
        if "failed" in one:
            lines.append(f"| {one['run']} | {one['failed']} |" + " |" * 13)
            continue
        shares = one["shares"]["share"]
        exposed = one["shares"]["exposed_communication_seconds"] / one["seconds"]
        lines.append(
            f"| {one['run']} | {one['seconds']:.3f} | {one['tokens_per_second_per_process']:,.0f} "
            f"| {one['utilization']:.1%} | {one.get('efficiency', float('nan')):.1%} | {one['peak_bytes'] / 1e9:.2f} "
            f"| {one['predicted_bytes'] / 1e9:.2f} | {one['plan_over_measured']:.3f} "
            f"| {one['teacher_bytes_held'] / 1e9:.2f} | {one['teacher_bytes'] / 1e9:.2f} | {one['loader_share']:.2%} "
            f"| {one['teacher_share']:.1%} | {shares.get('communication', 0):.1%} | {exposed:.1%} "
            f"| {shares.get('fake-quantization', 0):.1%} |"
        )
    return "\n".join(lines) + "\n"


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="blocks of a process and step")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument(
        "--processes", type=int, nargs="+", help="default: 2, 4, 8 … as many GPUs as there are"
    )
    parser.add_argument(
        "--no-single", dest="single", action="store_false", help="leave out one process alone"
    )
    parser.add_argument("--cached", action="store_true", help="also FSDP2 with cached logits")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    most = torch.cuda.device_count() or 2
    options.processes = options.processes or [2**n for n in range(1, 10) if 2**n <= most]
    return options


def main() -> None:
    """Measure one run after the other; the results so far are always on disk."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for run in runs(options):
        results.append(execute(options, run))
        print(run.name, results[-1].get("failed", "done"), flush=True)
        found = summary(options, results)
        (options.out / "distributed.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (options.out / "distributed.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
