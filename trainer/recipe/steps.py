"""How a recipe's tokens become optimizer steps, on any number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import Recipe


def blocks_per_step(recipe: Recipe) -> int:
    """Blocks of one optimizer step, all processes together."""
    if recipe.qat.global_batch_tokens is None:
        return recipe.qat.batch_size
    return max(1, round(recipe.qat.global_batch_tokens / recipe.data.block_size))


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of one optimizer step, all processes together."""
    return blocks_per_step(recipe) * recipe.data.block_size


def optimizer_steps(recipe: Recipe) -> int:
    """Optimizer steps of the whole run."""
    return max(1, -(-recipe.qat.tokens // tokens_per_step(recipe)))
