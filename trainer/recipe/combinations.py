"""Which fields of a recipe go together: the rules that no section can check alone.

Every rule refuses what cannot work, what would be ignored, or what would undo itself, with one line that names the
fields and what would be right. `tests/trainer/test_combinations.py` draws recipes: what is not refused here trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qatapult.kernels.scheme import Scheme
from qatapult.trainer.recipe import deployment as formats
from qatapult.trainer.recipe.schedule_rules import check_blockwise, check_schedule

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import Recipe

#: Methods whose scales follow from the weights at each step, so that nothing else can choose them.
RECOMPUTED = ("minmax", "ternary")
_COMPENSATING = ("gptq", "hadamard", "spinquant")
_RANGES = ("mse", "percentile", "awq")
#: Post-training methods after which hidden states are another basis' coordinates.
_ROTATIONS = ("hadamard", "spinquant")


def check_combination(recipe: Recipe) -> None:
    """Refuse methods, grids, schedules, losses, data and formats that do not go together.

    Raises:
        ValueError: naming the fields and what would be right.
    """
    _check_method(recipe)
    _check_trainable(recipe)
    _check_ptq(recipe)
    check_schedule(recipe)
    check_blockwise(recipe, rotation_before_training(recipe))
    _check_losses(recipe)
    _check_layer_losses(recipe)
    _check_data(recipe)
    _check_exports(recipe)


def layer_kinds(recipe: Recipe) -> Iterator[tuple[Scheme | None, Scheme | None]]:
    """Grids of weights and inputs that linears can have: the recipe's own, and one pair for each override."""
    quantization = recipe.quantization
    weights = quantization.weights.scheme if quantization.weights else None
    inputs = quantization.activations.scheme if quantization.activations else None
    yield weights, inputs
    for override in quantization.overrides:
        own = override.activations
        yield (
            override.weights.scheme if override.weights else None,
            inputs if own == "same" else own.scheme if own is not None else None,
        )


def quantizes_weights(recipe: Recipe) -> bool:
    return any(weights is not None for weights, _ in layer_kinds(recipe))


def quantizes_inputs(recipe: Recipe) -> bool:
    return any(inputs is not None for _, inputs in layer_kinds(recipe))


def rotation_before_training(recipe: Recipe) -> str | None:
    """The rotation that training may start from, if there is one."""
    start = recipe.ptq.initialize_from
    candidates = recipe.ptq.methods if start == "best" else (start,)
    return next((method for method in candidates if method in _ROTATIONS), None)


def _check_method(recipe: Recipe) -> None:
    """The method against the grids that it trains."""
    method, weights = recipe.qat.method, recipe.quantization.weights
    needed_bits = {"ternary": 1.58, "binary": 1}.get(method)
    if needed_bits and (weights is None or weights.bits != needed_bits):
        raise ValueError(f"qat.method '{method}' needs quantization.weights.bits={needed_bits}")
    grids = [grid for grid, _ in layer_kinds(recipe) if grid is not None]
    if recipe.quantization.embeddings is not None:
        grids.append(recipe.quantization.embeddings.scheme)
    if any(grid.bits == 1 for grid in grids) and method not in ("binary", "seq"):
        raise ValueError(f"qat.method '{method}' does not train 1-bit weights; use 'binary'")
    if method == "lsq+" and (weights is None or weights.symmetric):
        raise ValueError("qat.method 'lsq+' learns zero points; set quantization.weights.symmetric=false")
    if method == "seq" and (weights is None or weights.grid != "stretched"):
        raise ValueError("qat.method 'seq' needs quantization.weights.grid=stretched (2 bits and fewer)")
    if method == "pact" and not quantizes_inputs(recipe):
        raise ValueError("qat.method 'pact' learns activation clips; set quantization.activations")
    if method in RECOMPUTED and not quantizes_weights(recipe):
        raise ValueError(f"qat.method '{method}' is a rule for the weights' scales; set quantization.weights")
    _check_integer_forward(recipe)
    if recipe.qat.batch_size == 0 and recipe.qat.global_batch_tokens is None:
        raise ValueError(
            "qat.batch_size 'auto' needs qat.global_batch_tokens: the size of a step must not depend on the machine"
        )


def _check_integer_forward(recipe: Recipe) -> None:
    if recipe.qat.integer_forward is not True:
        return
    inputs = [grid for _, grid in layer_kinds(recipe)]
    if any(grid is None for grid in inputs) or not quantizes_weights(recipe):
        raise ValueError(
            "qat.integer_forward multiplies codes of weights and inputs; quantize both, or set it to auto"
        )
    if any(grid is not None and grid.range_method != "minmax" for grid in inputs):
        raise ValueError(
            "qat.integer_forward takes the inputs' min-max range; set quantization.activations.range=minmax"
        )


def _check_trainable(recipe: Recipe) -> None:
    """What trains, against what there is to train."""
    qat = recipe.qat
    if qat.method in RECOMPUTED and qat.trainable == "scales":
        raise ValueError(
            f"qat.trainable 'scales' does not go with qat.method '{qat.method}', which learns none"
        )
    if qat.trainable == "scales" and not quantizes_weights(recipe) and qat.method != "pact":
        raise ValueError("qat.trainable 'scales' has nothing to train without quantization.weights")
    if qat.trainable == "scales" and qat.optimizer.weight_decay:
        raise ValueError(
            "qat.optimizer.weight_decay is the weights', and qat.trainable is 'scales'; set it to 0"
        )
    if qat.trainable == "lora" and not quantizes_weights(recipe):
        raise ValueError(
            "qat.trainable 'lora' merges adapters onto the weights' grid; set quantization.weights"
        )


def _check_ptq(recipe: Recipe) -> None:
    """Post-training methods against the grids, and against what training makes of their result."""
    ptq, method = recipe.ptq, recipe.qat.method
    start = ptq.initialize_from
    if start not in ("best", "rtn", *ptq.methods):
        raise ValueError(f"ptq.initialize_from '{start}' is not measured; add it to ptq.methods")
    for name in ptq.methods:
        if name in (*_COMPENSATING, *_RANGES) and not quantizes_weights(recipe):
            raise ValueError(
                f"ptq.methods '{name}' rounds weights, and quantization.weights is null; set it, or use rtn"
            )
        if name == "smoothquant" and not (quantizes_weights(recipe) and quantizes_inputs(recipe)):
            raise ValueError(
                "ptq.methods 'smoothquant' moves range from inputs into weights; quantize both, or use awq"
            )
        if name in (*_COMPENSATING, *_RANGES) and method in RECOMPUTED:
            raise ValueError(
                f"ptq.methods '{name}' chooses scales, and qat.method '{method}' computes them anew from the "
                "weights; use ptq.methods=[rtn], or qat.method=lsq"
            )


def _check_losses(recipe: Recipe) -> None:
    """The loss against the teacher, and against itself."""
    distillation = recipe.qat.distillation
    kind = distillation.kind
    if kind == "none" and (distillation.cache or distillation.teacher):
        raise ValueError("qat.distillation.kind 'none' uses no teacher; remove teacher and cache")
    if kind == "none" and (distillation.cross_entropy or distillation.temperature != 1):
        raise ValueError(
            "qat.distillation.kind 'none' is the cross-entropy alone; leave cross_entropy and temperature out"
        )
    if distillation.cross_entropy == 1:
        raise ValueError("qat.distillation.cross_entropy 1 leaves nothing to the teacher; use kind 'none'")
    if kind == "jsd" and distillation.beta in (0, 1):
        raise ValueError("qat.distillation.beta must lie between 0 and 1: at the ends the divergence is zero")
    if kind != "jsd" and distillation.beta != 0.5:
        raise ValueError(f"qat.distillation.beta belongs to kind 'jsd', and kind is '{kind}'")


def _check_layer_losses(recipe: Recipe) -> None:
    """Losses between layers need the teacher's layers, in the student's coordinates."""
    distillation = recipe.qat.distillation
    for name in ("hidden", "attention"):
        if getattr(distillation, name) is None:
            continue
        if distillation.kind == "none":
            raise ValueError(f"qat.distillation.{name} needs a teacher; set qat.distillation.kind=forward_kl")
        if distillation.cache is not None:
            raise ValueError(
                f"qat.distillation.{name} needs the teacher's layers, and a cache holds its logits alone; "
                f"remove qat.distillation.{name} or qat.distillation.cache"
            )
    turned = rotation_before_training(recipe)
    if turned and distillation.hidden is not None:
        raise ValueError(
            f"qat.distillation.hidden compares hidden states, and ptq '{turned}' rotates the student's; "
            "use qat.distillation.attention, or ptq.initialize_from=gptq"
        )
    attention = distillation.attention
    if turned and attention is not None and attention.heads and "value" in attention.relations:
        raise ValueError(
            f"qat.distillation.attention.heads may cut through the heads whose values ptq '{turned}' rotates; "
            "leave heads out, or take query and key alone"
        )


def _check_data(recipe: Recipe) -> None:
    """Random tokens are no text, and stand alone."""
    data = recipe.data
    random = [source.kind == "random" for source in data.train]
    if any(random) and len(random) > 1:
        raise ValueError("data.train: 'random' tokens stand alone; no mixture with text")
    if data.held_out is not None and (any(random) or data.held_out.kind == "random"):
        raise ValueError(
            "data.held_out: 'random' tokens bring held-out ones of their own; leave held_out out"
        )
    task = recipe.qat.task
    if task is not None and any(s.kind == "random" for s in (*task.data, task.held_out) if s is not None):
        raise ValueError("qat.task is for a task's text, and 'random' tokens are none")
    if any(random) and recipe.evaluation.generate:
        raise ValueError("evaluation.generate continues held-out text, and data.train is 'random'")


def _check_exports(recipe: Recipe) -> None:
    """Every format that is written in the end has a form for every layer: a run must not fail at its last stage."""
    kinds = list(layer_kinds(recipe))
    for name in recipe.export:
        for weights, inputs in kinds:
            if weights is not None or inputs is not None:
                _check_export(name, weights, inputs)
        if name == "torchao" and len({weights for weights, _ in kinds}) > 1:
            raise ValueError(
                "export 'torchao': layers have different grids; use compressed-tensors, which describes them"
            )
    if recipe.qat.method == "pact" and "compressed-tensors" in recipe.export:
        raise ValueError(
            "export 'compressed-tensors' has no form for the clips of qat.method 'pact'; set export=[]"
        )
    if recipe.tracking.upload_checkpoint and ("wandb" not in recipe.tracking.trackers or not recipe.export):
        raise ValueError(
            "tracking.upload_checkpoint stores an export in wandb; add wandb to tracking.trackers and a format "
            "to export"
        )


def _check_export(name: str, weights: Scheme | None, inputs: Scheme | None) -> None:
    try:
        if name == "compressed-tensors":
            formats.check_compressed_tensors(weights, inputs)
        elif name == "torchao":
            formats.check_torchao(weights, inputs)
        elif name == "gguf":
            formats.check_some_gguf(weights, inputs)
    except ValueError as error:
        raise ValueError(f"export '{name}': {error}; or leave '{name}' out of export") from None
