"""A few real optimizer steps in a process of their own: seconds and peak memory, to check and refine plans.

`python -m qatapult.trainer.plan.probe RECIPE.yaml STEPS RESULT.json`, also under `accelerate launch`: the
engine is the launcher's, as in training. Text is random tokens, so that nothing but the model is loaded.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import TokenizedData
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.loop.engine import choose_allocation, create_accelerator, multiplies_bf16
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.measure import CostMeter, peak_memory
from qatapult.trainer.models import load_config, load_model
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.recipe.steps import blocks_per_step
from qatapult.trainer.run_folder import write_json

#: Steps before the measured ones: compilation, first allocations, optimizer states.
WARM_UP = 1


def probe(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Train for some steps on random tokens, on the engine that the launcher chose.

    Args:
        recipe: any recipe; only its sizes, grids and losses matter.
        steps: measured optimizer steps, after `WARM_UP` others.

    Returns:
        `seconds_per_step` (median), `peak_memory_bytes` and `runtime_memory_bytes` (before the model) of the
        largest rank, `tokens_per_step`, `world_size`, `device`.
    """
    accelerator = create_accelerator(recipe)
    choose_allocation(accelerator)
    device = accelerator.device
    runtime = peak_memory(device) if device.type == "cuda" else CostMeter(device).cost(0)["peak_memory_bytes"]
    model = load_model(recipe.model).to(device)
    if recipe.quantization.weights is not None or recipe.quantization.activations is not None:
        prepare(model, recipe.quantization, recipe.qat.method)
    teacher = None
    if recipe.qat.distillation.kind != "none":
        dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
        teacher = InProcessTeacher(load_model(recipe.model, dtype).to(device), accelerator)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator,
            recipe,
            model,
            teacher,
            _random_text(recipe),
            Path(folder),
            MetricsLog(None),
            Console(quiet=True),
        )
        CostMeter(device)  # the peak of loading does not count
        seconds = []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            trainer.step()
            seconds.append(time.perf_counter() - started)
    figures = torch.tensor(
        [statistics.median(seconds[WARM_UP:]), peak_memory(device), runtime],
        dtype=torch.float64,
        device=device,
    )
    largest = accelerator.gather(figures[None]).max(dim=0).values.tolist()
    return {
        "seconds_per_step": largest[0],
        "peak_memory_bytes": int(largest[1]),
        "runtime_memory_bytes": int(largest[2]),
        "tokens_per_step": trainer.tokens_per_step,
        "world_size": accelerator.num_processes,
        "device": device.type,
        "main": accelerator.is_main_process,
    }


def _random_text(recipe: Recipe) -> TokenizedData:
    size = recipe.data.block_size
    vocabulary = load_config(recipe.model).vocab_size
    generator = torch.Generator().manual_seed(recipe.seed)
    train = torch.randint(vocabulary, (4 * blocks_per_step(recipe), size), generator=generator)
    return TokenizedData(train, train[:1], torch.zeros_like(train[:1]))


def main() -> None:
    """Entry point; the main process writes the result."""
    recipe, steps, result = sys.argv[1:4]
    measured = probe(load_recipe(recipe), int(steps))
    if measured.pop("main"):
        write_json(Path(result), measured)


if __name__ == "__main__":
    main()
