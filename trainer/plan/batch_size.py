"""`qat.batch_size: auto`: the most blocks at a time that the plan's memory model lets a process compute here.

The size of an optimizer step is the recipe's (`qat.global_batch_tokens`), so this decides how a step is cut up and
nothing else: the losses are the same on every machine, to rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from qatapult.trainer.plan.hardware import Cluster, parse_cluster
from qatapult.trainer.plan.memory import Assumptions, memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.planner import usable
from qatapult.trainer.plan.settings import Engine, Offload, Setting, Teacher
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import AUTO, Recipe
from qatapult.trainer.recipe.steps import blocks_per_step


def resolve_batch_size(recipe: Recipe) -> Recipe:
    """The recipe with a number for `qat.batch_size: auto`, from this machine's memory and the launcher's engine.

    Raises:
        UserError: if not even one block fits.
    """
    if recipe.qat.batch_size != AUTO:
        return recipe
    world = int(os.environ.get("WORLD_SIZE", "1"))
    size = largest_batch(recipe, this_cluster(world, os.environ), *engine_of(world, os.environ))
    return with_batch_size(recipe, size)


def with_batch_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with another micro-batch."""
    return recipe.model_copy(update={"qat": recipe.qat.model_copy(update={"batch_size": size})})


def largest_batch(
    recipe: Recipe, cluster: Cluster, engine: Engine, offload: Offload, given: Assumptions | None = None
) -> int:
    """Most blocks that a process can compute at a time, cut so that the micro-batches of a step are equal.

    Args:
        recipe: says what is trained, and how many blocks a step has.
        cluster: the memory, and how many processes share it.
        engine: what is sharded.
        offload: what lies in main memory.
        given: constants of the memory model.

    Raises:
        UserError: if not even one block fits, with what it needs and what would help.
    """
    own = -(-blocks_per_step(recipe) // cluster.world)
    limit = usable(cluster.gpu) / (cluster.gpus if cluster.gpu.is_cpu else 1)
    shape, teacher = shape_of(recipe.model), _teacher(recipe, engine)

    def needed(size: int) -> float:
        setting = Setting(engine, offload, recipe.qat.gradient_checkpointing, size, teacher)
        return memory(recipe, shape, cluster, setting, given).device

    if needed(1) > limit:
        raise UserError(
            f"qat.batch_size auto: one block of {recipe.data.block_size} tokens needs {needed(1) / 1e9:.1f} GB a "
            f"process of {limit / 1e9:.1f}; use qat.gradient_checkpointing=true, a smaller data.block_size, or a "
            "sharded engine (qatapult plan)"
        )
    fitting = max(size for size in range(1, own + 1) if needed(size) <= limit)
    return -(-own // -(-own // fitting))


def engine_of(world: int, environment: Mapping[str, str]) -> tuple[Engine, Offload]:
    """The engine and offloading that the launcher's variables name."""
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        offload = environment.get("FSDP_OFFLOAD_PARAMS") == "true"
        return "fsdp2", "parameters" if offload else "none"
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _zero(environment)
    return ("single" if world == 1 else "ddp"), "none"


def this_cluster(world: int, environment: Mapping[str, str]) -> Cluster:
    """This machine's GPU, or its processor and main memory, as often as there are processes."""
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    if not torch.cuda.is_available():
        return parse_cluster(f"{local}xCPU", max(1, world // local))
    properties = torch.cuda.get_device_properties(int(environment.get("LOCAL_RANK", "0")))
    # Of a GPU the memory alone counts here, and of the node the number of processes.
    cluster = parse_cluster(f"{local}xA100-80GB", max(1, world // local))
    return replace(
        cluster, gpu=replace(cluster.gpu, name=properties.name, memory=float(properties.total_memory))
    )


def _zero(environment: Mapping[str, str]) -> tuple[Engine, Offload]:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    zero: dict[str, Any] = {}
    if file and file != "none":
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
    stage = zero.get("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    offload: Offload = "none"
    for name, what in (("OPTIMIZER", "optimizer"), ("PARAM", "parameters")):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")
        device = zero.get(f"offload_{name.lower()}", {}).get("device", device)
        if device not in (None, "none"):
            offload = cast(Offload, what)
    return cast(Engine, f"zero{stage}"), offload


def _teacher(recipe: Recipe, engine: Engine) -> Teacher:
    distillation = recipe.qat.distillation
    if distillation.kind == "none":
        return "none"
    if distillation.cache is not None:
        return "cached"
    return "sharded" if engine in ("zero3", "fsdp2") else "whole"
