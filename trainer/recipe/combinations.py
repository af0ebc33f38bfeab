"""Which fields of a recipe go together: the rules that no section can check alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import Recipe


def check_combination(recipe: Recipe) -> None:
    """Refuse methods and grids that do not go together.

    Raises:
        ValueError: naming the fields and what would be right.
    """
    qat, weights, activations = recipe.qat, recipe.quantization.weights, recipe.quantization.activations
    needed_bits = {"ternary": 1.58, "binary": 1}.get(qat.method)
    if needed_bits and (weights is None or weights.bits != needed_bits):
        raise ValueError(f"qat.method '{qat.method}' needs quantization.weights.bits={needed_bits}")
    if weights is not None and weights.bits == 1 and qat.method not in ("binary", "seq"):
        raise ValueError(f"qat.method '{qat.method}' does not train 1-bit weights; use 'binary'")
    if qat.method == "lsq+" and (weights is None or weights.symmetric):
        raise ValueError("qat.method 'lsq+' learns zero points; set quantization.weights.symmetric=false")
    if qat.method == "seq" and (weights is None or weights.grid != "stretched"):
        raise ValueError("qat.method 'seq' needs quantization.weights.grid=stretched (2 bits and fewer)")
    if qat.method == "pact" and activations is None:
        raise ValueError("qat.method 'pact' learns activation clips; set quantization.activations")
    if qat.method in ("minmax", "ternary") and qat.trainable == "scales":
        raise ValueError(
            f"qat.trainable 'scales' does not go with qat.method '{qat.method}', which learns none"
        )
    if qat.blockwise_tokens and _turned_by(recipe):
        raise ValueError(
            f"qat.blockwise_tokens compares each block's outputs, and ptq '{_turned_by(recipe)}' rotates them; "
            "use ptq.initialize_from=gptq, or qat.blockwise_tokens=0"
        )
    phases = qat.schedule.phases
    if phases and weights is not None and phases[-1].weights.scheme != weights.scheme:
        raise ValueError("qat.schedule.phases must end at quantization.weights, the grid that is deployed")
    if phases and any(p.weights.group_size != phases[-1].weights.group_size for p in phases):
        raise ValueError("qat.schedule.phases must keep one granularity: learned scales keep their shape")
    _check_distillation(recipe)


def _check_distillation(recipe: Recipe) -> None:
    """Which losses go with which teacher."""
    distillation = recipe.qat.distillation
    if distillation.kind == "none" and (distillation.cache or distillation.teacher):
        raise ValueError("qat.distillation.kind 'none' uses no teacher; remove teacher and cache")
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
    turned = _turned_by(recipe)
    if turned and distillation.hidden is not None:
        raise ValueError(
            f"qat.distillation.hidden compares hidden states, and ptq '{turned}' rotates the student's; "
            "use qat.distillation.attention, or ptq.initialize_from=gptq"
        )


#: Post-training methods after which hidden states are another basis' coordinates.
_ROTATIONS = ("hadamard", "spinquant")


def _turned_by(recipe: Recipe) -> str | None:
    """The rotation that training may start from, if there is one."""
    start = recipe.ptq.initialize_from
    candidates = recipe.ptq.methods if start == "best" else (start,)
    return next((method for method in candidates if method in _ROTATIONS), None)
