"""Stage `qat`: train against the full-precision teacher, and optionally the fair control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qatapult.trainer.context import Context
from qatapult.trainer.distill.cache import CachedTeacher
from qatapult.trainer.distill.layers import pair_layers
from qatapult.trainer.distill.teacher import InProcessTeacher, Teacher
from qatapult.trainer.loop.blockwise import train_blockwise
from qatapult.trainer.loop.blockwise_disk import load_trained_blocks, train_blockwise_from_disk
from qatapult.trainer.loop.checkpoint import list_checkpoints, require_disk_space
from qatapult.trainer.loop.engine import multiplies_bf16
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.ptq.rotation import untie_for
from qatapult.trainer.recipe.schema import Distillation
from qatapult.trainer.stages import ptq


def run(context: Context) -> dict[str, Any]:
    """Train, keep the best weights, and report the curve."""
    meter = context.meter()
    model = starting_point(context)
    if context.recipe.qat.trainable == "lora":
        lora.add_adapters(model, context.recipe.qat.lora_rank)
    check_disk(context, model)
    trainer = Trainer(
        context.accelerator,
        context.recipe,
        model,
        build_teacher(context, model),
        context.data,
        context.run.checkpoints,
        metrics_log(context),
        context.console,
    )
    state = trainer.train()
    trainer.load_best()
    measured = trainer.evaluate()
    save_trained(context, trainer)
    result = {
        "perplexity": measured.value,
        "losses": measured.losses,
        "tasks": {},
        "steps": state.step,
        "tokens": state.tokens,
        "best_step": state.best_step,
        "best_tokens": next((p["tokens"] for p in state.curve if p["step"] == state.best_step), state.tokens),
        "curve": state.curve,
        "stopped_early": state.step < trainer.steps,
        "skipped_steps": state.skipped_steps,
        "rollbacks": state.rollbacks,
        "loader_share": state.loader_seconds / state.step_seconds if state.step_seconds else 0.0,
        "cost": meter.cost(state.tokens),
    }
    context.accelerator.free_memory()
    del trainer, model
    evaluation = context.recipe.evaluation
    if context.accelerator.is_main_process and (evaluation.tasks or evaluation.generate):
        result |= context.judge(load_trained(context), "qat")
    result["control"] = run_control(context) if context.recipe.qat.control else None
    return result


def starting_point(context: Context) -> PreTrainedModel:
    """What training end to end begins with: post-training quantization's model, trained block by block if asked."""
    qat = context.recipe.qat
    if not qat.blockwise_tokens or list_checkpoints(context.run.checkpoints):
        return ptq.load_quantized(context)
    context.console.say("  block by block")
    if not qat.blockwise_offload:
        model = ptq.load_quantized(context)
        train_blockwise(model, context.load_model(), context.data.train, context.recipe, context.console.say)
        return model
    folder = context.run.artifact("blockwise")
    if context.accelerator.is_main_process:
        weights = context.run.artifact("ptq") / "model.safetensors"
        train_blockwise_from_disk(
            weights, context.recipe, context.data.train, folder, context.device, context.console.say
        )
    context.accelerator.wait_for_everyone()
    model = ptq.load_quantized(context)
    load_trained_blocks(model, folder)
    return model


def run_control(context: Context) -> dict[str, Any]:
    """Fine-tune the full-precision model on the same tokens: gains of fine-tuning are not recovery."""
    meter = context.meter()
    qat = context.recipe.qat.model_copy(update={"distillation": Distillation(kind="none")})
    recipe = context.recipe.model_copy(update={"qat": qat})
    trainer = Trainer(
        context.accelerator,
        recipe,
        context.load_model(),
        None,
        context.data,
        context.run.path / "control" / "checkpoints",
        MetricsLog(None),
        context.console,
    )
    state = trainer.train()
    trainer.load_best()
    measured = trainer.evaluate()
    context.accelerator.free_memory()
    return {"perplexity": measured.value, "losses": measured.losses, "cost": meter.cost(state.tokens)}


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


def check_disk(context: Context, model: PreTrainedModel) -> None:
    """Refuse to start without room for the checkpoints: weights, and two Adam moments of what trains."""
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    copies = context.recipe.qat.checkpoints.keep + 2
    require_disk_space(context.run.path, 3 * total * copies)
