"""The second stage of a recipe as a recipe of its own: the same loop fine-tunes for the task."""

from __future__ import annotations

from qatapult.trainer.recipe.schema import Data, Recipe, Schedule, Task

# Fine-tuning starts from a model that is where it should be.
_SHARE_OF_THE_RATE = 1 / 3


def task_data(recipe: Recipe, task: Task) -> Data:
    """The task's text, cut as the recipe's own."""
    return recipe.data.model_copy(update={"train": task.data, "held_out": task.held_out, "fraction": 1.0})


def task_recipe(recipe: Recipe, task: Task, weights_rate: float) -> Recipe:
    """The recipe of the second stage.

    Args:
        recipe: the whole run's.
        task: its second stage.
        weights_rate: peak learning rate of the first stage.
    """
    qat = recipe.qat
    loss = qat.distillation.model_copy(update={"cross_entropy": task.cross_entropy, "cache": None})
    if task.cross_entropy == 1 or loss.kind == "none":
        loss = loss.model_copy(
            update={"kind": "none", "cross_entropy": 0.0, "teacher": None, "hidden": None, "attention": None}
        )
    rate = weights_rate * _SHARE_OF_THE_RATE if task.learning_rate == "auto" else task.learning_rate
    update = {
        "tokens": task.tokens,
        "distillation": loss,
        "optimizer": qat.optimizer.model_copy(update={"learning_rate": rate}),
        "schedule": Schedule(),
        "evaluate_every_tokens": None,
        "blockwise_tokens": 0,
        "blockwise_offload": False,
        "task": None,
    }
    return recipe.model_copy(update={"data": task_data(recipe, task), "qat": qat.model_copy(update=update)})
