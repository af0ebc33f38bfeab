"""The Accelerate engine: one process, DDP, FSDP2 or DeepSpeed, chosen by the launcher and never by the recipe."""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qatapult.kernels.common.allocator import keep_freed_memory, return_freed_memory
from qatapult.trainer.distill.student import Student
from qatapult.trainer.distill.teacher import zero_stage
from qatapult.trainer.loop.attention import compose_attention
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Qat, Recipe
from qatapult.trainer.recipe.steps import blocks_per_step

# The main process alone measures baselines and calibrates; the others wait for it.
_LONGEST_WAIT = timedelta(hours=12)


def create_accelerator(recipe: Recipe) -> Accelerator:
    """Build the Accelerator for the environment that the launcher left.

    Raises:
        UserError: if the number of processes is not what the launcher promised, for fp16 without a GPU or under
            DeepSpeed, or for a DeepSpeed file that rounds weights.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and recipe.qat.precision == "fp16":
        raise UserError("qat.precision 'fp16' does not run under DeepSpeed; use bf16 or fp32, or DDP")
    if recipe.qat.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("qat.precision 'fp16' needs a GPU; use auto, bf16 or fp32")
    backend = None if torch.cuda.is_available() else "gloo"
    _find_deepspeed_config()
    if backend == "gloo" and deepspeed:
        _build_no_operators()
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=_LONGEST_WAIT)]
    if _distributed():
        state = PartialState(cpu=_plain_ddp_on_cpu(), backend=backend, timeout=_LONGEST_WAIT)
    else:
        state = PartialState()
    _check_world_size(state)
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else autocast_precision(recipe.qat),
        gradient_accumulation_steps=micro_batches(recipe, state.num_processes),
        kwargs_handlers=handlers,
    )
    _keep_weights_in_fp32(accelerator)
    if zero_stage(accelerator) == 3:
        from transformers.integrations import unset_hf_deepspeed_config

        # Stages that the main process runs alone load whole models; `prepare` shards the one that trains.
        unset_hf_deepspeed_config()
    return accelerator


def choose_allocation(accelerator: Accelerator) -> None:
    """On a CPU, keep freed memory, which is faster, but give it back under engines that are chosen to save memory.

    Their gathered weights and buckets come and go in so many sizes that a heap that keeps them grows by half and more.
    Who sets glibc's `MALLOC_MMAP_THRESHOLD_` has chosen.
    """
    if accelerator.device.type != "cpu" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    (return_freed_memory if sharded else keep_freed_memory)()


def _keep_weights_in_fp32(accelerator: Accelerator) -> None:
    """Let `prepare_student` choose the precision of products by autocast, under FSDP2 and DeepSpeed as elsewhere.

    Accelerate's policy for FSDP2 casts every parameter to 16 bits where it is gathered, and DeepSpeed's 16-bit engines
    keep them so. A quantized layer would then lay a rounded weight on a grid with a rounded scale, and train on other
    codes than those that are packed.
    """
    fsdp, deepspeed = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    if fsdp is not None and fsdp.fsdp_version == 2:
        fsdp.mixed_precision_policy = MixedPrecisionPolicy()
    sections = {} if deepspeed is None else deepspeed.deepspeed_config
    for section in ("bf16", "fp16"):
        if sections.get(section, {}).get("enabled") is True:
            raise UserError(
                f"DeepSpeed's {section}.enabled rounds weights and scales before they are laid on their grid; leave it "
                "out of its file: qat.precision chooses the precision of products"
            )


def _find_deepspeed_config() -> None:
    """Let the shipped Accelerate configs name the shipped DeepSpeed ones from any working folder."""
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    shipped = Path(str(files("qatapult.configs"))) / named.removeprefix("configs/")
    if named.startswith("configs/") and not Path(named).exists() and shipped.exists():
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(shipped)


def _build_no_operators() -> None:
    """Keep DeepSpeed from compiling an all-reduce in C++, for minutes: on CPUs gloo's is there."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def autocast_precision(qat: Qat) -> str:
    """`bf16`, `fp16` or `no`. CPUs without bf16 instructions multiply bf16 several times slower than fp32."""
    if qat.precision == "fp32":
        return "no"
    if qat.precision != "auto":
        return qat.precision
    return "bf16" if multiplies_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def micro_batches(recipe: Recipe, world_size: int) -> int:
    """Forward and backward passes of one optimizer step on each process."""
    own = -(-blocks_per_step(recipe) // world_size)
    return -(-own // recipe.qat.batch_size)


def configure_forward(model: PreTrainedModel, qat: Qat) -> None:
    """Gradient checkpointing, attention, and which products the quantized layers compute."""
    compose_attention(model)
    if qat.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    modes: dict[bool | str, Literal["auto", "integer", "fake"]] = {
        True: "integer",
        False: "fake",
        "auto": "auto",
    }
    for layer in quant_layers(model).values():
        layer.integer_forward = modes[qat.integer_forward]


def prepare_student(
    accelerator: Accelerator, recipe: Recipe, student: Student, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Hand model and optimizer to the engine together, which FSDP2 and DeepSpeed ask for.

    Returns:
        The wrapped model, whose forward is the student's, and the wrapped optimizer.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None or accelerator.is_fsdp2:
        student.forward = _autocast(accelerator, recipe.qat)(student.forward)  # type: ignore[method-assign]
    if plugin is not None:
        # DeepSpeed learns these from the recipe: no loader that it knows of has them.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.qat.batch_size
        plugin.deepspeed_config["gradient_clipping"] = recipe.qat.optimizer.gradient_clip
        if zero_stage(accelerator) == 3:
            import deepspeed

            # The loss multiplies with the head outside the head's own forward.
            deepspeed.zero.register_external_parameter(student, student.model.get_output_embeddings().weight)
    return accelerator.prepare(student, optimizer)


def _autocast(accelerator: Accelerator, qat: Qat) -> torch.autocast:
    """What Accelerate puts around the forward pass under one process and DDP alone."""
    precision = autocast_precision(qat)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator.device.type, dtype, enabled=precision != "no")


def backward(accelerator: Accelerator, loss: Tensor, factor: float) -> None:
    """Backward pass of a micro-batch.

    DeepSpeed clips, steps and clears gradients at the end of a step's last one, unless a gradient is not finite. So a
    loss that is not finite makes all gradients NaN, and the step is left out there as it is under the other engines.

    Args:
        accelerator: the engine.
        loss: scalar.
        factor: on the loss.
    """
    ones = torch.ones_like(loss)
    accelerator.backward(loss * factor * torch.where(torch.isfinite(loss.detach()), ones, ones * torch.nan))


def gradient_norm(accelerator: Accelerator, model: nn.Module, limit: float) -> float:
    """Clip the gradients of all processes together, or ask DeepSpeed, which has done it; the norm before."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return float(accelerator.deepspeed_engine_wrapped.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def local_tensors(parameters: list[nn.Parameter]) -> list[Tensor]:
    """What this process holds of sharded parameters."""
    local = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in parameters]
    return [tensor for tensor in local if tensor.numel()]


def _distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _plain_ddp_on_cpu() -> bool:
    """Whether to tell Accelerate that it is on the CPU.

    Without being told it forms a world in which nothing is reduced; told, it takes DeepSpeed and FSDP for DDP.
    """
    sharded = any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))
    return not torch.cuda.is_available() and not sharded


def _check_world_size(state: PartialState) -> None:
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    # Accelerate can know of other processes and still reduce and gather nothing.
    actual = 1 if state.distributed_type == DistributedType.NO else state.num_processes
    if actual != promised:
        raise UserError(
            f"the launcher promised {promised} processes and {actual} found each other; check the Accelerate "
            "config's distributed_type and num_processes (qatapult doctor)"
        )
