"""Delayed, progressive and block-wise training: which schedules go with which grids."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from qatapult.trainer.recipe.steps import optimizer_steps

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import Recipe


def check_schedule(recipe: Recipe) -> None:
    """Refuse schedules that never reach the deployed grid, or that undo what they trained.

    Raises:
        ValueError: naming the field and what would be right.
    """
    schedule, quantization = recipe.qat.schedule, recipe.quantization
    for tensor in ("weights", "activations"):
        start = getattr(schedule, f"{tensor}_start")
        if start == 1:
            raise ValueError(
                f"qat.schedule.{tensor}_start 1 never quantizes them in training; use less than 1"
            )
        given = getattr(quantization, tensor) is not None
        if tensor == "activations":
            given |= any(o.activations not in ("same", None) for o in quantization.overrides)
        if start and not given:
            raise ValueError(f"qat.schedule.{tensor}_start delays nothing: quantization.{tensor} is null")
    if schedule.weights_start and recipe.qat.trainable == "scales":
        raise ValueError(
            "qat.schedule.weights_start leaves qat.trainable 'scales' nothing to train before it; set it to 0"
        )
    if schedule.phases:
        _check_phases(recipe)
    steps = optimizer_steps(recipe)
    last = 1 - schedule.phases[-1].fraction if schedule.phases else 0.0
    if max(schedule.weights_start, schedule.activations_start, last) > (steps - 1) / steps + 1e-9:
        raise ValueError(
            f"qat.schedule comes to the deployed grid after the last of {steps} steps; raise qat.tokens, or start "
            "earlier"
        )


def _check_phases(recipe: Recipe) -> None:
    phases, weights = recipe.qat.schedule.phases, recipe.quantization.weights
    if weights is None or phases[-1].weights.scheme != weights.scheme:
        raise ValueError("qat.schedule.phases must end at quantization.weights, the grid that is deployed")
    for field in ("granularity", "group_size", "symmetric"):
        if any(getattr(p.weights, field) != getattr(weights, field) for p in phases):
            raise ValueError(f"qat.schedule.phases must keep one {field}: learned scales keep their shape")
    if any(later.weights.bits > earlier.weights.bits for earlier, later in pairwise(phases)):
        raise ValueError("qat.schedule.phases must not go up in bits, as 8, 4, 3, 2")
    if recipe.quantization.overrides or recipe.quantization.embeddings:
        raise ValueError(
            "qat.schedule.phases puts every layer on one grid; remove quantization.overrides and .embeddings"
        )
    if recipe.qat.trainable == "scales" and len(phases) > 1:
        raise ValueError(
            "qat.schedule.phases chooses scales anew in each phase, and qat.trainable is 'scales': nothing would "
            "be left of the earlier phases; train linears or lora"
        )
    if recipe.qat.schedule.weights_start >= phases[0].fraction:
        raise ValueError("qat.schedule.weights_start skips the first of qat.schedule.phases; make it less")


def check_blockwise(recipe: Recipe, rotation: str | None) -> None:
    """Refuse a block-wise phase whose targets or results do not fit what comes before and after it.

    Args:
        recipe: the recipe.
        rotation: post-training method that turns hidden states before training, if there is one.

    Raises:
        ValueError: naming the field and what would be right.
    """
    qat = recipe.qat
    if not qat.blockwise_tokens:
        if qat.blockwise_offload:
            raise ValueError("qat.blockwise_offload is for a block-wise phase; set qat.blockwise_tokens")
        return
    if rotation:
        raise ValueError(
            f"qat.blockwise_tokens compares each block's outputs, and ptq '{rotation}' rotates them; "
            "use ptq.initialize_from=gptq, or qat.blockwise_tokens=0"
        )
    if qat.schedule.phases or qat.schedule.weights_start or qat.schedule.activations_start:
        raise ValueError(
            "qat.blockwise_tokens trains on the deployed grid, and qat.schedule leaves it again; use one of them"
        )
