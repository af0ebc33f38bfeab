"""Out of memory ends in one message: what the plan counted, and the three settings to change."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator, DistributedType

from qatapult.trainer.distill.teacher import zero_stage
from qatapult.trainer.plan.hardware import Cluster, parse_cluster
from qatapult.trainer.plan.memory import memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.settings import Engine, Offload, Setting, Teacher
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe


@contextmanager
def explained_out_of_memory(accelerator: Accelerator, recipe: Recipe) -> Iterator[None]:
    """Turn an allocator's error into one line, on the process that it happens to.

    Raises:
        UserError: naming the rank, the plan's numbers and what to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = explanation(accelerator, recipe)
        if accelerator.process_index:  # the command line prints rank 0's errors only
            print(f"qatapult: error: {text}", file=sys.stderr, flush=True)
        raise UserError(text) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator on a GPU or a CPU had nothing left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)


def explanation(accelerator: Accelerator, recipe: Recipe) -> str:
    """The line: rank, what the device has, what the plan counted, the settings to change."""
    setting = current_setting(accelerator, recipe)
    device = "GPU" if accelerator.device.type == "cuda" else "machine"
    there = (
        f"rank {accelerator.process_index} is out of memory: its {device} has {_gib(_capacity(accelerator))}"
    )
    try:
        planned = memory(recipe, shape_of(recipe.model), _cluster(accelerator), setting)
    except UserError:  # an architecture that the plan does not count
        return f"{there}; {advice(recipe, setting)}"
    largest = sorted(planned.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in largest)
    return (
        f"{there}, and {setting.name} needs about {_gib(planned.device)} ({parts}); {advice(recipe, setting)}"
    )


def advice(recipe: Recipe, setting: Setting) -> str:
    """The three settings to change, those first that cost least."""
    changes = []
    if not setting.checkpointing:
        changes.append("qat.gradient_checkpointing=true")
    if recipe.qat.batch_size > 1:
        changes.append(f"qat.batch_size={recipe.qat.batch_size // 2}")
    if not setting.shards_weights:
        changes.append("an engine that shards weights (fsdp2 or zero3)")
    elif setting.offload == "none":
        changes.append(f"offloading ({setting.engine}-offload)")
    if setting.teacher not in ("none", "cached"):
        changes.append("qat.distillation.cache (`qatapult teacher cache`)")
    changes.append(f"data.block_size={recipe.data.block_size // 2}")
    return f"change {', '.join(changes[:2])} or {changes[2]}; `qatapult plan` shows what each saves"


def current_setting(accelerator: Accelerator, recipe: Recipe) -> Setting:
    """This run in the plan's words."""
    sharded = False
    engine: Engine = "single" if accelerator.num_processes == 1 else "ddp"
    if accelerator.distributed_type == DistributedType.FSDP:
        engine, sharded = "fsdp2", True
    elif stage := zero_stage(accelerator):
        engines: dict[int, Engine] = {1: "zero1", 2: "zero2", 3: "zero3"}
        engine, sharded = engines[stage], stage == 3
    distillation = recipe.qat.distillation
    teacher: Teacher = "sharded" if sharded else "whole"
    if distillation.kind == "none":
        teacher = "none"
    elif distillation.cache is not None:
        teacher = "cached"
    return Setting(
        engine, _offload(accelerator), recipe.qat.gradient_checkpointing, recipe.qat.batch_size, teacher
    )


def _offload(accelerator: Accelerator) -> Offload:
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("offload_param", {}).get("device", "none") != "none":
            return "parameters"
        return "optimizer" if zero.get("offload_optimizer", {}).get("device", "none") != "none" else "none"
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return "parameters" if fsdp is not None and fsdp.cpu_offload else "none"


def _cluster(accelerator: Accelerator) -> Cluster:
    on_gpu = accelerator.device.type == "cuda"
    node = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    kind = "A100-80GB" if on_gpu else "CPU"  # a step needs the same of every GPU
    return parse_cluster(f"{node}x{kind}", max(1, accelerator.num_processes // node))


def _capacity(accelerator: Accelerator) -> float:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory
    return psutil.virtual_memory().total


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
