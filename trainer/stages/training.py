"""What the stages that train have in common: the teacher, the trained tensors on disk, and the room for checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qatapult.trainer.context import Context
from qatapult.trainer.distill.cache import CachedTeacher
from qatapult.trainer.distill.layers import pair_layers
from qatapult.trainer.distill.teacher import InProcessTeacher, Teacher
from qatapult.trainer.loop.engine import multiplies_bf16
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.ptq.rotation import untie_for


def build_teacher(context: Context, student: PreTrainedModel) -> Teacher | None:
    """The teacher that the recipe asks for, in bf16 where the hardware multiplies it."""
    distillation = context.recipe.qat.distillation
    if distillation.kind == "none":
        return None
    if distillation.cache is not None:
        folder = Path(distillation.cache)
        processes = context.accelerator.process_index, context.accelerator.num_processes
        return CachedTeacher(
            folder, context.data.fingerprint, distillation.temperature, context.device, *processes
        )
    source = context.recipe.model
    if distillation.teacher is not None:
        source = source.model_copy(update={"source": distillation.teacher})
    dtype = torch.bfloat16 if multiplies_bf16(context.device) else torch.float32
    model = load_model(source, dtype).to(context.device)  # type: ignore[arg-type]
    return InProcessTeacher(
        model, context.accelerator, pair_layers(distillation, student.config, model.config)
    )


def metrics_log(context: Context) -> MetricsLog:
    """The run's metrics, with what recovery is measured against."""
    baseline = context.run.read_stage("baseline")["perplexity"]
    rtn = context.run.read_stage("ptq")["methods"]["rtn"]["perplexity"]
    run = context.run if context.accelerator.is_main_process else None
    return MetricsLog(run, context.tracking, baseline, rtn, context.owner)


def save_trained(context: Context, trainer: Trainer) -> None:
    """Write the trained model's tensors, gathered from all processes, under their own names."""
    state = context.accelerator.get_state_dict(trainer.student)
    if context.accelerator.is_main_process:
        path = context.run.artifact("qat") / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(".building")
        tied = set(getattr(trainer.model, "_tied_weights_keys", None) or ())
        tensors = lora.merged({name.removeprefix("model."): tensor for name, tensor in state.items()})
        kept = {n: t.contiguous() for n, t in tensors.items() if not (n in tied and ties(trainer.model))}
        save_file(kept, str(building))
        building.replace(path)
    context.accelerator.wait_for_everyone()


def ties(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


def load_trained(context: Context) -> PreTrainedModel:
    """The prepared model after training."""
    model = context.load_prepared()
    path = context.run.artifact("qat") / "model.safetensors"
    untie_for(model, path)
    load_tensors(model, str(path), strict=not ties(model), device=str(context.device))
    return model.eval()
