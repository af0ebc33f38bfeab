"""Stage `qat`: train against the full-precision teacher, and optionally the fair control."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel

from qatapult.trainer.context import Context
from qatapult.trainer.loop.blockwise import train_blockwise
from qatapult.trainer.loop.blockwise_disk import load_trained_blocks, train_blockwise_from_disk
from qatapult.trainer.loop.checkpoint import list_checkpoints
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.measure import add_costs
from qatapult.trainer.quantize import lora
from qatapult.trainer.recipe.schema import Distillation
from qatapult.trainer.run_folder import write_json
from qatapult.trainer.stages import ptq
from qatapult.trainer.stages.task import fine_tune
from qatapult.trainer.stages.training import (
    build_teacher,
    load_trained,
    metrics_log,
    save_trained,
)


def run(context: Context) -> dict[str, Any]:
    """Recover, fine-tune for the task if there is one, judge, and run the control if it is asked for."""
    qat = context.recipe.qat
    stored = context.run.artifact("qat") / "recovery.json"
    if stored.exists():
        result: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
    else:
        result = recover(context)
    if qat.task is not None:
        if context.accelerator.is_main_process:
            write_json(stored, result)
        meter = context.meter()
        result |= fine_tune(context, qat.task, result)
        result["cost"] = add_costs(result["cost"], meter.cost(result["task"]["tokens"]))
    evaluation = context.recipe.evaluation
    if context.accelerator.is_main_process and (evaluation.tasks or evaluation.generate):
        result |= context.judge(load_trained(context), "qat")
    result["control"] = run_control(context) if qat.control else None
    return result


def recover(context: Context) -> dict[str, Any]:
    """Train against the teacher, keep the best weights, and report the curve."""
    meter = context.meter()
    model = starting_point(context)
    if context.recipe.qat.trainable == "lora":
        lora.add_adapters(model, context.recipe.qat.lora_rank)
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
