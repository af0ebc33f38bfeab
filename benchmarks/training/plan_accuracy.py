"""How far off `qatapult plan` is: peak memory of real runs on the CPU engines, published costs, A100 tables.

python benchmarks/training/plan_accuracy.py memory      # runs SmolLM2-135M on one and two processes
python benchmarks/training/plan_accuracy.py published   # no run: plans of published settings
python benchmarks/training/plan_accuracy.py tables      # LLaMA-2-7B, 13B, 70B on 8, 64 and 512 A100s
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState

from qatapult.trainer.plan import probe
from qatapult.trainer.plan.accelerate_config import deepspeed_config
from qatapult.trainer.plan.calibrate import run_probe
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.memory import memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.planner import make_plan
from qatapult.trainer.plan.settings import Engine, Setting, Teacher
from qatapult.trainer.plan.speed import SpeedAssumptions, step_time
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_json

#: Measured steps: a heap with holes has not reached its size after the first.
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A run to measure."""

    name: str
    engine: Engine
    processes: int
    blocks: int
    block_size: int = 256
    qat: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)

    def recipe(self, model: str) -> Recipe:
        """The recipe of the run for a named shape."""
        return Recipe.model_validate(
            {
                "name": "probe",
                "model": {"source": f"random:{model}"},
                "data": {"block_size": self.block_size},
                "quantization": self.quantization,
                "qat": {"batch_size": self.blocks} | self.qat | {
                    "global_batch_tokens": self.processes * self.blocks * self.block_size
                },
            }
        )  # fmt: skip

    def teacher(self) -> Teacher:
        if self.qat.get("distillation", {}).get("kind") == "none":
            return "none"
        return "sharded" if self.engine in ("zero3", "fsdp2") else "whole"


CASES = (
    Case("distillation, 2 × 256 tokens", "single", 1, 2),
    Case("distillation, 4 × 256 tokens", "single", 1, 4),
    Case("no teacher", "single", 1, 2, qat={"distillation": {"kind": "none"}}),
    Case("scales only", "single", 1, 2, qat={"trainable": "scales"}),
    Case("all weights", "single", 1, 2, qat={"trainable": "all"}),
    Case("recomputing", "single", 1, 4, qat={"gradient_checkpointing": True}),
    Case("groups of 32", "single", 1, 2, quantization={
        "weights": {"bits": 4, "granularity": "group", "group_size": 32}}),
    Case("2 processes", "ddp", 2, 2),
    Case("2 processes, no teacher", "ddp", 2, 2, qat={"distillation": {"kind": "none"}}),
    Case("2 processes", "zero1", 2, 2),
    Case("2 processes", "zero2", 2, 2),
    Case("2 processes", "zero3", 2, 2),
    Case("2 processes", "fsdp2", 2, 2),
    Case("2 processes, no teacher", "fsdp2", 2, 2, qat={"distillation": {"kind": "none"}}),
)  # fmt: skip


def measure_memory(model: str, pattern: str) -> None:
    """Predicted and measured peak memory of every case whose engine and name match the pattern."""
    print("| engine | run | predicted GB | measured GB | predicted / measured |")
    print("|---|---|---:|---:|---:|", flush=True)
    for case in CASES:
        if not re.search(pattern, f"{case.engine} {case.name}"):
            continue
        recipe = case.recipe(model)
        setting = Setting(case.engine, "none", recipe.qat.gradient_checkpointing, case.blocks, case.teacher())
        predicted = memory(
            recipe, shape_of(recipe.model), parse_cluster(f"{case.processes}xCPU"), setting
        ).device
        measured = run_probe(recipe, STEPS, launcher(case), environment(case))
        peak = measured["peak_memory_bytes"]
        figures = f"{predicted / 1e9:.2f} | {peak / 1e9:.2f} | {predicted / peak:.3f}"
        print(f"| {case.engine} | {case.name} | {figures} |", flush=True)


def launcher(case: Case) -> list[str]:
    """How the processes of a case are started."""
    if case.processes == 1:
        return [sys.executable]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={case.processes}",
    ]
    return [*command, __file__, "probe"] if case.engine == "fsdp2" else command


def fsdp2_probe(arguments: list[str]) -> None:
    """`-m qatapult.trainer.plan.probe …` where Accelerate is told that it may shard on the CPU as well."""
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.argv = arguments[1:]
    probe.main()


def environment(case: Case) -> dict[str, str]:
    """What Accelerate reads to choose the engine."""
    if case.engine == "fsdp2":
        return {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        }
    if not case.engine.startswith("zero"):
        return {"ACCELERATE_USE_CPU": "true"}
    file = Path(tempfile.mkdtemp()) / "deepspeed.json"
    setting = Setting(case.engine, "none", False, case.blocks, case.teacher())
    write_json(file, deepspeed_config(setting))
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",  # the model is laid on its grids before it is sharded
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }


def compare_published() -> None:
    """Plans of settings whose cost somebody published; the inputs that a source does not give are stated."""
    print("| published | figure | plan | plan / published |")
    print("|---|---:|---:|---:|")
    for name, figure, planned, unit in (brief_7b(), efficientqat_70b(), torchtune_8b()):
        print(f"| {name} | {figure:,.1f} {unit} | {planned:,.1f} {unit} | {planned / figure:.2f} |")


def brief_7b() -> tuple[str, float, float, str]:
    """8 × A100-80GB for 3–5 days, $2,000–3,000: the price of 4 days; tokens are not stated."""
    cluster = parse_cluster("8xA100-80GB")
    return "7B QAT, 4 days of 8 × A100-80GB (cost only)", 2500.0, 4 * 24 * 8 * cluster.price, "$"


def efficientqat_70b() -> tuple[str, float, float, str]:
    """EfficientQAT, 70B on one A100-80GB: 41 h.

    Block-wise: 4096 × 2048 tokens, 2 epochs, each block forward and backward, the teacher's forward once;
    end to end on the scales: 4096 × 4096 tokens, forward, recomputed, backward to the inputs alone.
    """
    shape = shape_of(Recipe.model_validate({"name": "x", "model": {"source": "random:llama-2-70b"}}).model)
    gpu = parse_cluster("A100-80GB").gpu
    rate = SpeedAssumptions().rate(gpu, shape.hidden, 2)
    blockwise = 2 * 4096 * 2048 * 2 * shape.linear_parameters * (3 + 0.5)
    end_to_end = 4096 * 4096 * 2 * shape.linear_parameters * (2 + 1)  # recomputed once
    return "EfficientQAT 70B, one A100-80GB", 41.0, (blockwise + end_to_end) / rate / 3600, "h"


def torchtune_8b() -> tuple[str, float, float, str]:
    """torchtune's QAT of Llama-3-8B: 205.8 tokens/s a GPU; its batch is not stated, here 2 × 512 tokens."""
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"source": "random:llama-3-8b"},
            "data": {"block_size": 512},
            "quantization": {"weights": {"bits": 4, "granularity": "group", "group_size": 256}},
            "qat": {"trainable": "all", "global_batch_tokens": 6144, "distillation": {"kind": "none"}},
            "export": [],
        }
    )
    cluster = parse_cluster("6xA100-80GB")
    step = step_time(recipe, shape_of(recipe.model), cluster, Setting("fsdp2", "none", True, 2, "none"))
    return "torchtune QAT Llama-3-8B", 205.8, step.tokens / step.seconds / cluster.world, "tokens/s a GPU"


def print_tables() -> None:
    """The cheapest fitting setting of each engine for the LLaMA-2 family."""
    columns = ["model", "A100s", "engine", "teacher", "recompute", "batch", "GB a GPU"]
    columns += ["s/step", "tokens/s", "hours / B tokens", "cost"]
    print("| " + " | ".join(columns) + " |")
    print("|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|")
    for model in ("llama-2-7b", "llama-2-13b", "llama-2-70b"):
        for nodes in (1, 8, 64):
            recipe = Recipe.model_validate(
                {
                    "name": "table",
                    "model": {"source": f"random:{model}"},
                    "data": {"block_size": 2048},
                    "qat": {"tokens": 1_000_000_000, "global_batch_tokens": 2048 * max(128, 8 * nodes)},
                }
            )
            plan = make_plan(recipe, parse_cluster("8xA100-80GB", nodes))
            seen: set[str] = set()
            for candidate in plan.best_per_engine():
                setting = candidate.setting
                if setting.engine in seen or setting.teacher == "cached" or setting.offload != "none":
                    continue
                seen.add(setting.engine)
                row = [
                    model,
                    8 * nodes,
                    setting.name,
                    setting.teacher,
                    "yes" if setting.checkpointing else "no",
                ]
                row += [setting.micro_batch, f"{candidate.memory.device / 1e9:.1f}"]
                if candidate.fits:
                    row += [f"{candidate.step.seconds:.2f}", f"{candidate.tokens_per_second:,.0f}"]
                    row += [f"{candidate.hours:.1f}", f"${candidate.cost:,.0f}"]
                else:
                    row += ["does not fit", "", "", ""]
                print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "tables"
    if what == "memory":
        model, pattern = [*sys.argv[2:], *("smollm2-135m", "")[len(sys.argv) - 2 :]][:2]
        measure_memory(model, pattern)
    elif what == "probe":
        fsdp2_probe(sys.argv[2:])
    elif what == "published":
        compare_published()
    else:
        print_tables()


if __name__ == "__main__":
    main()
