"""LLaMA-shaped models with random weights, made on the device, and trainers of them: shared by the benchmarks here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import TokenizedData
from qatapult.trainer.distill.teacher import Teacher
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.plan.model_shape import ModelShape
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.recipe.steps import blocks_per_step
from qatapult.trainer.shapes import RANDOM_SHAPES

#: Dense bf16 of an H100 SXM or H200 by NVIDIA's datasheet, operations a second.
HOPPER_BF16 = 989e12


def source_with_layers(name: str, layers: int) -> str:
    """`model.source` of a known shape cut (or extended) to so many layers, from here on known by that name."""
    shortened = f"{name}-{layers}-layers"
    RANDOM_SHAPES[shortened] = RANDOM_SHAPES[name] | {"num_hidden_layers": layers}
    return f"random:{shortened}"


def random_model(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The recipe's random shape with weights drawn on the device: on the CPU billions of them take minutes."""
    shape = RANDOM_SHAPES[recipe.model.source.removeprefix("random:")]
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype).eval()


def random_text(recipe: Recipe, steps: int = 4) -> TokenizedData:
    """Blocks of random tokens for so many different optimizer steps."""
    size, generator = recipe.data.block_size, torch.Generator().manual_seed(recipe.seed)
    vocabulary = RANDOM_SHAPES[recipe.model.source.removeprefix("random:")]["vocab_size"]
    train = torch.randint(vocabulary, (steps * blocks_per_step(recipe), size), generator=generator)
    return TokenizedData(train, train[:1], torch.zeros_like(train[:1]))


def distillation_recipe(source: str, block_size: int, batch: int, processes: int = 1, **qat: Any) -> Recipe:
    """W4A8 per channel under distillation; a step is one micro-batch on each process, unless `qat` says otherwise."""
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"source": source},
            "data": {"block_size": block_size},
            "qat": {
                "batch_size": batch,
                "global_batch_tokens": processes * batch * block_size,
                "optimizer": {"learning_rate": 1e-5},
            }
            | qat,
        }
    )


def trainer_of(
    accelerator: Accelerator, recipe: Recipe, model: PreTrainedModel, teacher: Teacher | None, folder: Path
) -> Trainer:
    """This project's loop over random text."""
    text, log, console = random_text(recipe), MetricsLog(None), Console(quiet=True)
    return Trainer(accelerator, recipe, model, teacher, text, folder, log, console)


def model_flops(shape: ModelShape, block_size: int, teacher: bool = True) -> float:
    """Operations a trained token that the mathematics needs; what checkpointing recomputes does not count.

    2 a weight forward, 2 for the inputs' gradient, 2 for the weights' gradient (the frozen head has none), and 2 for
    the teacher; attention's scores and values over the causal half, forward, twice backward and in the teacher.
    """
    attention = shape.layers * 2 * block_size * shape.query_width
    forward = 2 * (shape.linear_parameters + shape.head_parameters) + attention
    student = 6 * shape.linear_parameters + 4 * shape.head_parameters + 3 * attention
    return student + (forward if teacher else 0)


def matmul_rate(device: torch.device, size: int = 8192, int8: bool = False) -> float:
    """Operations a second of a large product of random matrices, median of ten: the ceiling to compare with."""
    if int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        multiply: Callable[[], object] = lambda: torch._int_mm(a, b.t())  # noqa: E731
    else:
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        multiply = lambda: a @ b  # noqa: E731
    seconds = [device_seconds(multiply, device) for _ in range(13)]
    return 2 * size**3 / statistics.median(seconds[3:])


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call by events on the GPU, by the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3
