"""Stage `ptq`: post-training quantization, the baseline to beat and the point that training starts from."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from transformers import PreTrainedModel

from qatapult.trainer.context import Context
from qatapult.trainer.insight.rounding import rounding
from qatapult.trainer.quantize.clipping import calibrate_clips
from qatapult.trainer.quantize.ptq.calibration import spread_blocks
from qatapult.trainer.quantize.ptq.rotation import untie_for
from qatapult.trainer.recipe.schema import PtqMethod, Quantization

#: Methods that round to the nearest grid point and differ in the range alone.
_ROUND_TO_NEAREST = {"rtn": "minmax", "mse": "mse", "percentile": "percentile"}


def run(context: Context) -> dict[str, Any]:
    """Measure every method of the recipe, and keep the tensors of the one that training starts from."""
    meter = context.meter()
    settings = context.recipe.ptq
    measured: dict[str, Any] = {}
    wanted = settings.initialize_from
    best: str | None = None
    for method in dict.fromkeys(("rtn", *settings.methods)):
        context.console.say(f"  {method}")
        method_meter = context.meter()
        model = quantize(context, method)
        result = context.perplexity(model, method)
        measured[method] = {
            "perplexity": result.value,
            "losses": result.losses,
            **context.judge(model, method),
            "rounding": rounding(model),
            "cost": method_meter.cost(result.tokens),
        }
        if best is None or result.value < measured[best]["perplexity"]:
            best = method
        if method == wanted or (wanted == "best" and method == best):
            save_model(context, model)
        del model
    assert best is not None
    return {
        "methods": measured,
        "samples": measured["rtn"].get("samples", []),
        "initialize_from": best if wanted == "best" else wanted,
        "cost": meter.cost(sum(entry["cost"]["tokens"] for entry in measured.values())),
    }


def quantize(context: Context, method: PtqMethod | str) -> PreTrainedModel:
    """A fresh model, prepared and quantized by a method."""
    quantization = context.recipe.quantization
    calibration = spread_blocks(context.data.train, context.recipe.ptq.calibration.blocks).to(context.device)
    if method in _ROUND_TO_NEAREST:
        model = context.load_prepared(with_range(quantization, _ROUND_TO_NEAREST[method]))
    else:
        model = context.load_prepared()
        module = importlib.import_module(f"qatapult.trainer.quantize.ptq.{method}")
        module.quantize(model, calibration, context.recipe.ptq, quantization)
    calibrate_clips(model, calibration)
    return model


def with_range(quantization: Quantization, range_method: str) -> Quantization:
    """The same grids with another way to choose the weights' ranges; ternary and binary keep their own."""
    if quantization.weights is None or quantization.weights.bits < 2:
        return quantization
    weights = quantization.weights.model_copy(update={"range": range_method})
    return quantization.model_copy(update={"weights": weights})


def save_model(context: Context, model: PreTrainedModel) -> None:
    """Keep a prepared model's tensors for the next stage."""
    path = context.run.artifact("ptq") / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".building")
    save_tensors(model, str(building))
    building.replace(path)


@torch.no_grad()
def load_quantized(context: Context) -> PreTrainedModel:
    """The prepared model that training starts from."""
    model = context.load_prepared()
    path = context.run.artifact("ptq") / "model.safetensors"
    untie_for(model, path)
    load_tensors(model, str(path), device=str(context.device))
    return model
