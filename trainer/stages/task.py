"""The second stage of training: the recovered model learns a task, and stays on its grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qatapult.trainer.context import Context
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.optimizer import weight_bits
from qatapult.trainer.loop.schedules import learning_rate
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.quantize import lora
from qatapult.trainer.recipe.schema import Task
from qatapult.trainer.recipe.steps import optimizer_steps
from qatapult.trainer.recipe.task import task_recipe
from qatapult.trainer.stages.training import build_teacher, load_trained, save_trained


def fine_tune(context: Context, task: Task, before: dict[str, Any]) -> dict[str, Any]:
    """Train the recovered model on the task's text, and keep what is best on the task's held-out text.

    Args:
        context: a run whose recovered model is stored; it is replaced by the fine-tuned one.
        task: the stage.
        before: the first stage's result, after whose steps and tokens the metrics go on.

    Returns:
        `perplexity` and `losses` of the general held-out text now, and `task`: perplexities of the task's held-out
        text before and after, steps and tokens.
    """
    context.console.say("  task")
    model = load_trained(context)
    rate = learning_rate(context.recipe.qat.optimizer, weight_bits(model), optimizer_steps(context.recipe))
    recipe = task_recipe(context.recipe, task, rate)
    data = load_data(recipe, context.tokenizer)
    if recipe.qat.trainable == "lora":
        lora.add_adapters(model, recipe.qat.lora_rank)
    trainer = Trainer(
        context.accelerator,
        recipe,
        model,
        build_teacher(replace(context, recipe=recipe), model),
        data,
        context.run.path / "task" / "checkpoints",
        _log(context, before),
        context.console,
    )
    first = trainer.evaluate().value
    state = trainer.train()
    trainer.load_best()
    after = trainer.evaluate().value
    trainer.data = context.data
    measured = trainer.evaluate()
    save_trained(context, trainer)
    context.accelerator.free_memory()
    return {
        "perplexity": measured.value,
        "losses": measured.losses,
        "task": {
            "perplexity_before": first,
            "perplexity": after,
            "recovered_perplexity": before["perplexity"],
            "steps": state.step,
            "tokens": state.tokens,
            "best_step": state.best_step,
            "curve": state.curve,
        },
    }


def _log(context: Context, before: dict[str, Any]) -> MetricsLog:
    """The run's metrics go on after the first stage's, with the task's perplexity under a name of its own."""
    run = context.run if context.accelerator.is_main_process else None
    return MetricsLog(
        run,
        context.tracking,
        owner=context.owner,
        evaluated="eval/task_perplexity",
        after=(before["steps"], before["tokens"]),
    )
