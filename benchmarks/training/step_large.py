"""A training step of a LLaMA-2-7B-shaped model: what QAT adds to plain distillation, and where the time goes.

    python benchmarks/training/step_large.py --out step_large                                  # a GPU of 80 GB
    python benchmarks/training/step_large.py --layers 8 --batch 8 --no-checkpointing --out step_large_8
    python benchmarks/training/step_large.py --shape tiny --layers 2 --block-size 64 --group-size 32 --out step  # a CPU

All variants train the same weights on the same random tokens with AdamW against the same teacher, each through this
project's loop; they take turns in every round, and optimizer states belong to the one whose turn it is. The table shows
medians, ratios to plain distillation, the peak of the allocator with what `qatapult plan` predicts, and the rate
of the mathematics' operations (`large_model.model_flops`) as a share of the datasheet's 989 TFLOP/s and of a large bf16
product measured here. If the model does not fit, two layers are left out until it does. Under `--out`: `step.json`,
`step.md`, and the profiler's table of one step of each variant.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from kernel_shares import profile_step
from large_model import (
    HOPPER_BF16,
    device_seconds,
    distillation_recipe,
    matmul_rate,
    model_flops,
    random_model,
    source_with_layers,
    trainer_of,
)
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.distill.teacher import InProcessTeacher, Teacher
from qatapult.trainer.loop.engine import create_accelerator, multiplies_bf16
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.measure import CostMeter, device_name, peak_memory
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.memory import memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.settings import Setting
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.schema import Quantization, Recipe

PLAIN = "plain distillation"


@dataclass(frozen=True)
class Variant:
    """A way to train: None quantizes nothing."""

    quantization: Mapping[str, Any] | None
    integer_forward: bool | str = "auto"


def variants(group_size: int) -> dict[str, Variant]:
    """All of them by name."""
    groups = {"bits": 4, "granularity": "group", "group_size": group_size}
    return {
        PLAIN: Variant(None),
        "QAT W4A8 per channel": Variant({}),
        "QAT W4A8 per channel, fake-quantized forward": Variant({}, integer_forward=False),
        f"QAT W4A8 g{group_size}": Variant({"weights": groups}),
    }


@dataclass
class Figures:
    """What was measured of a variant."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


class MarkedTeacher:
    """A teacher whose work the profiler finds under the name `teacher`."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """See `Teacher`."""
        with record_function("teacher"):
            return self._teacher.signal(ids, blocks)


class Contest:
    """All variants over the same weights.

    Args:
        options: of the command line.
        layers: of the model.
    """

    def __init__(self, options: argparse.Namespace, layers: int, scratch: Path) -> None:
        self.options = options
        self.recipe = recipe_of(options, layers)
        self.accelerator = create_accelerator(self.recipe)
        self.device = self.accelerator.device
        model = random_model(self.recipe, torch.float32, self.device)
        dtype = torch.bfloat16 if multiplies_bf16(self.device) else torch.float32
        teacher = MarkedTeacher(InProcessTeacher(random_model(self.recipe, dtype, self.device)))
        self.variants = variants(options.group_size)
        self.trainers = {
            name: variant_trainer(self.accelerator, self.recipe, model, teacher, variant, scratch)
            for name, variant in self.variants.items()
        }

    def run(self) -> dict[str, Figures]:
        """Seconds and peak bytes of every variant; each turn begins with a step that is not counted."""
        figures = {name: Figures() for name in self.trainers}
        for _ in range(self.options.rounds):
            for name, trainer in self.trainers.items():
                trainer.step()
                CostMeter(self.device)
                figures[name].seconds += [
                    device_seconds(trainer.step, self.device) for _ in range(self.options.steps)
                ]
                figures[name].peak_bytes = max(figures[name].peak_bytes, peak_memory(self.device))
                self.rest(trainer)
        return figures

    def shares(self, out: Path) -> dict[str, Any]:
        """Where one step of each variant goes; the profiler's tables are written to the folder."""
        found = {}
        for number, (name, trainer) in enumerate(self.trainers.items()):
            trainer.step()
            found[name] = profile_step(trainer.step, self.device, out / f"profile_{number}.txt").as_json()
            self.rest(trainer)
        return found

    def rest(self, trainer: Trainer) -> None:
        """Let go of the optimizer's states, so that the next variant has the memory for its own."""
        trainer.optimizer.optimizer.state.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def recipe_of(options: argparse.Namespace, layers: int) -> Recipe:
    """The recipe that all variants share but for what is quantized."""
    return distillation_recipe(
        source_with_layers(options.shape, layers),
        options.block_size,
        options.batch,
        gradient_checkpointing=options.checkpointing,
    )


def variant_recipe(recipe: Recipe, variant: Variant) -> Recipe:
    """The recipe with a variant's grids and forward pass."""
    quantization = variant.quantization
    grids = {"weights": None, "activations": None} if quantization is None else quantization
    qat = recipe.qat.model_copy(update={"integer_forward": variant.integer_forward})
    return recipe.model_copy(update={"quantization": Quantization.model_validate(grids), "qat": qat})


def variant_trainer(
    accelerator: Accelerator,
    recipe: Recipe,
    model: PreTrainedModel,
    teacher: Teacher,
    variant: Variant,
    scratch: Path,
) -> Trainer:
    """A trainer of a copy of the model that has modules of its own and the same parameters."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    own = variant_recipe(recipe, variant)
    if variant.quantization is not None:
        prepare(shared, own.quantization, own.qat.method)
    return trainer_of(accelerator, own, shared, teacher, scratch)


def measure(options: argparse.Namespace, layers: int, out: Path) -> dict[str, Any]:
    """Everything about the contest at this depth.

    Raises:
        torch.OutOfMemoryError: if it does not fit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        contest = Contest(options, layers, Path(scratch))
        figures = contest.run()
        result = summary(options, contest, figures, layers)
        write(out, result)
        if options.profile:
            result["shares"] = contest.shares(out)
            write(out, result)
    return result


def summary(
    options: argparse.Namespace, contest: Contest, figures: dict[str, Figures], layers: int
) -> dict[str, Any]:
    """Medians, ratios, rates and predictions in plain types."""
    device, shape = contest.device, shape_of(contest.recipe.model)
    tokens = options.batch * options.block_size
    flops = tokens * model_flops(shape, options.block_size)
    ceiling = matmul_rate(device, 8192 if device.type == "cuda" else 512)
    rows = {}
    for name, found in figures.items():
        seconds = statistics.median(found.seconds)
        rows[name] = {
            "seconds": seconds,
            "all_seconds": found.seconds,
            "peak_bytes": found.peak_bytes,
            "predicted_bytes": predicted_bytes(contest.recipe, contest.variants[name], device),
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "utilization": flops / seconds / HOPPER_BF16,
            "share_of_ceiling": flops / seconds / ceiling,
        }
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "shape": options.shape,
        "layers": layers,
        "parameters": shape.parameters,
        "block_size": options.block_size,
        "batch": options.batch,
        "gradient_checkpointing": options.checkpointing,
        "flops_per_step": flops,
        "matmul_flops_per_second": ceiling,
        "int8_matmul_ops_per_second": matmul_rate(device, int8=True) if device.type == "cuda" else None,
        "variants": rows,
    }


def predicted_bytes(recipe: Recipe, variant: Variant, device: torch.device) -> float:
    """`qatapult plan`'s peak for the variant, without the driver's memory that the allocator does not count."""
    setting = Setting("single", "none", recipe.qat.gradient_checkpointing, recipe.qat.batch_size, "whole")
    cluster = parse_cluster("1xH100-80GB" if device.type == "cuda" else "1xCPU")
    needs = memory(variant_recipe(recipe, variant), shape_of(recipe.model), cluster, setting)
    return needs.device - (needs.runtime if device.type == "cuda" else 0.0)


def markdown(result: dict[str, Any]) -> str:
    """The result as a table, with the shares of the step below."""
    head = (
        f"{result['device']}, torch {result['torch']}: {result['shape']} with {result['layers']} layers "
        f"({result['parameters'] / 1e9:.2f} billion weights), "
        f"{result['batch']} × {result['block_size']} tokens a step, "
        f"gradient checkpointing {'on' if result['gradient_checkpointing'] else 'off'}; "
        f"bf16 product {result['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    lines = [
        head,
        "",
        "| variant | ms a step | × plain | peak GB | × plain | plan GB | tokens/s | TFLOP/s | of 989 | of product |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = result["variants"]
    plain = rows[PLAIN]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds'] * 1e3:.1f} | {row['seconds'] / plain['seconds']:.3f} "
            f"| {row['peak_bytes'] / 1e9:.2f} | {row['peak_bytes'] / plain['peak_bytes']:.3f} "
            f"| {row['predicted_bytes'] / 1e9:.2f} | {row['tokens_per_second']:,.0f} "
            f"| {row['model_flops_per_second'] / 1e12:.1f} | {row['utilization']:.1%} | {row['share_of_ceiling']:.1%} |"
        )
    for name, found in result.get("shares", {}).items():
        parts = ", ".join(f"{purpose} {share:.1%}" for purpose, share in found["share"].items())
        lines += ["", f"{name}: {parts} of {found['kernel_seconds'] * 1e3:.1f} ms in kernels"]
    return "\n".join(lines) + "\n"


def write(out: Path, result: dict[str, Any]) -> None:
    """`step.json` and `step.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "step.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "step.md").write_text(markdown(result), encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a turn")
    parser.add_argument("--group-size", type=int, default=128, help="of the variant in groups")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, with fewer layers if need be, and print the table."""
    options = parse_options()
    layers = options.layers
    while True:
        try:
            result = measure(options, layers, options.out)
            break
        except torch.OutOfMemoryError:
            if layers <= 2:
                raise
        gc.collect()  # outside of the handler, whose traceback still held the model
        torch.cuda.empty_cache()
        print(f"{layers} layers do not fit", flush=True)
        layers -= 2
    print(markdown(result))


if __name__ == "__main__":
    main()
