"""`insight.json` of a run: what quantization and training did to weights, activations, importance, scales."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.kernels import quantize
from qatapult.trainer.console import Console
from qatapult.trainer.context import Context
from qatapult.trainer.insight import activations, importance, parts, scales, weights
from qatapult.trainer.insight.sentences import claims, sentences
from qatapult.trainer.loop.checkpoint import list_checkpoints, stored_tensors
from qatapult.trainer.loop.engine import create_accelerator
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.stages.ptq import load_quantized
from qatapult.trainer.stages.training import load_trained
from qatapult.trainer.tracking.trackers import Tracking

Part = Literal["weights", "activations", "importance", "scales"]
PARTS: tuple[Part, ...] = ("weights", "activations", "importance", "scales")


@dataclass(frozen=True)
class InsightSettings:
    """What to look at.

    Attributes:
        parts: which analyses.
        blocks: held-out blocks for everything that runs the models.
        rise: rise of the perplexity that the pruning experiment tolerates (0.05: five per cent).
    """

    parts: tuple[Part, ...] = PARTS
    blocks: int = 4
    rise: float = 0.05


@dataclass
class Models:
    """The same model three times: original, as training started, as it ended; each loads when first needed."""

    context: Context

    @cached_property
    def full_precision(self) -> PreTrainedModel:
        return self.context.load_model().eval()

    @cached_property
    def ptq(self) -> PreTrainedModel:
        return load_quantized(self.context).eval()

    @cached_property
    def qat(self) -> PreTrainedModel:
        return load_trained(self.context)

    def items(self) -> list[tuple[str, PreTrainedModel]]:
        return [("full_precision", self.full_precision), ("ptq", self.ptq), ("qat", self.qat)]


def insight(context: Context, settings: InsightSettings) -> dict[str, Any]:
    """Analyse a run whose training is finished, and write `insight.json` into its folder, part by part.

    Parts that an earlier call measured with the same settings are kept.

    Raises:
        UserError: if training is not finished.
    """
    if not context.run.stage("qat").exists():
        raise UserError(f"{context.run.path}: training is not finished; insight needs the trained model")
    blocks = context.data.held_out[: settings.blocks]
    asked = parts.question(context.run, blocks.numel(), settings.rise)
    result = parts.stored(context.run, asked) or {"question": asked}
    result |= {"blocks": len(blocks), "tokens": blocks.numel()}
    models = Models(context)
    for part in settings.parts:
        if part in result:
            context.console.say(f"  {part}: as measured before")
            continue
        meter = context.meter()
        result[part] = _ANALYSES[part](context, models, blocks, settings)
        result["cost"] = parts.added_cost(result.get("cost"), meter.cost(blocks.numel()))
        _conclude(context, result)
    _conclude(context, result)  # sentences may have changed since the parts were measured
    return result


def _conclude(context: Context, result: dict[str, Any]) -> None:
    result["sentences"], result["claims"] = sentences(result), claims(result)
    parts.save(context.run, result)


def open_context(run: RunFolder, console: Console) -> Context:
    """What the stages of a run shared, to look at it again; nothing goes to trackers."""
    recipe = load_recipe(run.recipe)
    untracked = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"trackers": ()})})
    accelerator = create_accelerator(untracked)
    return Context(recipe, run, accelerator, console, Tracking(accelerator, untracked, run))


def look_at_weights(
    context: Context, models: Models, blocks: Tensor, settings: InsightSettings
) -> dict[str, Any]:
    """Weights against their grid, before, after PTQ and after QAT."""
    before, after = _weight_layers(models.ptq), _weight_layers(models.qat)
    histories = code_histories(context.run.checkpoints, before, after)
    fits: dict[str, list[tuple[weights.GridFit, int]]] = {"full_precision": [], "ptq": [], "qat": []}
    rows = []
    with _steps(context.console, len(after), "weights") as step:
        for name, layer in after.items():
            assert layer.weight_scheme is not None
            original = models.full_precision.get_parameter(f"{name}.weight").flatten(1)
            of = {
                "full_precision": weights.nearest_fit(original, layer.weight_scheme),
                "ptq": weights.layer_fit(before[name]),
                "qat": weights.layer_fit(layer),
            }
            for model, fit in of.items():
                fits[model].append((fit, original.numel()))
            rows.append(_weight_row(name, before[name], layer, of, histories[name]))
            step()
    counts = [count for _, count in fits["qat"]]
    return {
        **{model: weights.total(pairs) for model, pairs in fits.items()},
        "changed": _weighted([row["changed"] for row in rows], counts),
        "oscillating": _weighted([row["oscillating"] for row in rows], counts),
        "snapshots": len(next(iter(histories.values()))),
        "layers": rows,
    }


def look_at_activations(
    context: Context, models: Models, blocks: Tensor, settings: InsightSettings
) -> dict[str, Any]:
    """Inputs of every quantized linear, and massive activations and sinks."""
    schemes = activations.input_schemes(_weight_layers(models.qat))
    result: dict[str, Any] = {}
    by_layer: dict[str, dict[str, Any]] = {name: {"name": name} for name in schemes}
    ranges: dict[str, float] | None = None
    with _steps(context.console, 3 * (len(blocks) + 2), "activations") as step:
        for model_name, model in models.items():
            layers = activations.layer_activations(model, blocks, schemes, ranges, step)
            ranges = ranges or {name: layer.static_range for name, layer in layers.items()}
            for name, layer in layers.items():
                by_layer[name][model_name] = layer.as_json()
            result[model_name] = activations.total(layers.values())
            result[model_name]["massive"] = activations.massive_activations(model, blocks)[:8]
            step()
            result[model_name]["sinks"] = activations.attention_sinks(model, blocks[:1])
            step()
    return {**result, "layers": list(by_layer.values())}


def look_at_importance(
    context: Context, models: Models, blocks: Tensor, settings: InsightSettings
) -> dict[str, Any]:
    """Concentration of the neurons' importance, and the channel-pruning experiment."""
    names = importance.last_projections(models.full_precision)
    if not names:
        return {}
    result: dict[str, Any] = {"shares": list(importance.SHARES), "rise": settings.rise}
    with _steps(context.console, 3 * (len(blocks) + len(importance.SHARES)), "importance") as step:
        for model_name, model in models.items():
            taylor, fisher = importance.neuron_importance(model, blocks, names, step)
            curve = importance.pruned_perplexities(model, blocks, taylor, on_progress=step)
            result[model_name] = {
                **_concentration("taylor", taylor),
                **_concentration("fisher", fisher),
                "perplexities": curve,
                "tolerated": importance.tolerated_share(importance.SHARES, curve, settings.rise),
            }
    return result


def _concentration(kind: str, of: Mapping[str, Tensor]) -> dict[str, float]:
    values = torch.cat(list(of.values()))
    return {f"{kind}_gini": importance.gini(values), f"{kind}_top": importance.top_share(values)}


def look_at_scales(
    context: Context, models: Models, blocks: Tensor, settings: InsightSettings
) -> dict[str, Any]:
    """How scales moved, and what each group of layers still costs."""
    before, after = _weight_layers(models.ptq), _weight_layers(models.qat)
    moves = {
        name: scales.scale_moves(before[name].grid()[0], layer.grid()[0]) for name, layer in after.items()
    }
    layers = quant_layers(models.qat)
    groups = len(scales.sampled_groups(scales.layer_groups(layers), scales.MOST_BLOCKS))
    with context.console.progress(groups, "ablation") as meter:
        ablation = scales.ablation(models.qat, layers, blocks[: scales.ABLATION_BLOCKS], meter.update)
    means = {
        key: sum(move[key] for move in moves.values()) / len(moves) for key in ("mean", "spread", "moved")
    }
    return {**means, "ablation": ablation, "layers": [{"name": name, **move} for name, move in moves.items()]}


_ANALYSES = {
    "weights": look_at_weights,
    "activations": look_at_activations,
    "importance": look_at_importance,
    "scales": look_at_scales,
}


def code_histories(
    checkpoints: Path, before: Mapping[str, QuantizedWeight], after: Mapping[str, QuantizedWeight]
) -> dict[str, list[Tensor]]:
    """Codes of each layer at the start of training, at every checkpoint that was kept, and at its end."""
    kept = [_codes_in(folder, after) for folder in list_checkpoints(checkpoints)]
    return {
        name: [before[name].codes(), *(codes[name] for codes in kept if name in codes), layer.codes()]
        for name, layer in after.items()
    }


def _codes_in(folder: Path, layers: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Codes of the layers in a checkpoint."""
    stored = stored_tensors(folder, "weights")
    codes = {}
    for name, layer in layers.items():
        scale_name, zero_name = f"{name}.weight_scale", f"{name}.weight_zero_point"
        if scale_name not in stored.shapes or layer.weight_scheme is None:
            continue
        matrix = stored.whole(f"{name}.weight").float().flatten(1)
        zero_point = stored.whole(zero_name) if zero_name in stored.shapes else None
        codes[name] = quantize(matrix, stored.whole(scale_name), zero_point, layer.weight_scheme)
    return {name: tensor.to(layers[name].weight.device) for name, tensor in codes.items()}


@contextmanager
def _steps(console: Console, total: int, description: str) -> Iterator[Callable[..., None]]:
    """Progress of work in equal steps: the function that it gives counts one, whatever it is called with."""
    with console.progress(total, description) as meter:
        count = itertools.count(1)

        def step(*_: object) -> None:
            meter.update(next(count))

        yield step


def _weight_layers(model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    return {name: layer for name, layer in quant_layers(model).items() if layer.weight_scheme is not None}


def _weight_row(
    name: str,
    before: QuantizedWeight,
    after: QuantizedWeight,
    of: Mapping[str, weights.GridFit],
    history: Sequence[Tensor],
) -> dict[str, Any]:
    assert after.weight_scheme is not None
    figures = ("near", "distance", "clipped", "levels_used", "entropy_bits", "kurtosis", "tail")
    return {
        "name": name,
        "bits": after.weight_scheme.bits,
        "scale": float(after.grid()[0].detach().mean()),
        "error_before": of["full_precision"].error,
        "error_after": of["qat"].error,
        "changed": weights.changed(before.codes(), after.codes()),
        "oscillating": weights.oscillating(history),
        **{model: {figure: getattr(fit, figure) for figure in figures} for model, fit in of.items()},
    }


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
