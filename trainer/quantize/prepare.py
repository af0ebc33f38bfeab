"""`prepare`: turn a model's layers into quantized ones, in place, without changing a parameter's name."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from qatapult.kernels import Scheme
from qatapult.trainer.quantize.kv_cache import quantize_kv_cache
from qatapult.trainer.quantize.modules import (
    QuantConv2d,
    QuantEmbedding,
    QuantizedWeight,
    QuantLinear,
    ScaleSource,
)
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import QatMethod, Quantization

_QUANTIZED_CLASS: dict[type[nn.Module], type[QuantizedWeight]] = {
    nn.Linear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.Conv2d: QuantConv2d,
}

_SCALE_SOURCE: dict[QatMethod, ScaleSource] = {
    "lsq": "learned",
    "lsq+": "learned_with_zero_point",
    "seq": "learned",
    "binary": "learned",
    "pact": "learned",
    "minmax": "recomputed",
    "ternary": "recomputed",
}


@dataclass(frozen=True)
class LayerGrid:
    """The grids of one layer."""

    weights: Scheme | None
    activations: Scheme | None


def layer_grids(model: nn.Module, quantization: Quantization) -> dict[str, LayerGrid]:
    """Which layers are quantized, and onto which grids.

    Raises:
        UserError: if a group size does not divide a layer, or a pattern of an override matches nothing.
    """
    grids: dict[str, LayerGrid] = {}
    matched: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_QUANTIZED_CLASS)) or _matches(name, quantization.skip):
            continue
        grid = _default_grid(module, quantization)
        for override in quantization.overrides:
            if fnmatchcase(name, override.match):
                matched.add(override.match)
                activations = grid.activations if override.activations == "same" else override.activations
                grid = LayerGrid(
                    override.weights.scheme if override.weights else None,
                    activations if isinstance(activations, Scheme | None) else activations.scheme,
                )
        if grid.weights is not None or grid.activations is not None:
            _check_group(name, module, grid.weights)
            grids[name] = grid
    for override in quantization.overrides:
        if override.match not in matched:
            raise UserError(f"quantization.overrides: {override.match!r} matches no layer of this model")
    if not grids:
        raise UserError("quantization: nothing is quantized; set quantization.weights or .activations")
    return grids


def prepare(model: nn.Module, quantization: Quantization, method: QatMethod = "lsq") -> nn.Module:
    """Swap layers for quantized ones in place, with scales chosen from their weights.

    Parameters keep their objects and qualified names, so tied weights stay tied.

    Args:
        model: any module with `nn.Linear`, `nn.Embedding` or `nn.Conv2d` inside.
        quantization: which layers, and onto which grids.
        method: decides which scales are learned (`schema.QatMethod`).

    Returns:
        The same model.

    Raises:
        UserError: as `layer_grids`.
    """
    for name, grid in layer_grids(model, quantization).items():
        swap(model, name, grid, _SCALE_SOURCE[method], learned_clip=method == "pact")
    if quantization.kv_cache is not None:
        quantize_kv_cache(model, quantization.kv_cache.scheme)
    return model


def swap(
    model: nn.Module, name: str, grid: LayerGrid, scale_source: ScaleSource, learned_clip: bool = False
) -> None:
    """Turn one layer into its quantized form. The module object stays, so hooks and references hold."""
    layer = model.get_submodule(name)
    if not isinstance(layer, QuantizedWeight):
        layer.__class__ = next(new for old, new in _QUANTIZED_CLASS.items() if isinstance(layer, old))
    assert isinstance(layer, QuantizedWeight)
    layer.configure(
        grid.weights, grid.activations, scale_source, learned_clip and grid.activations is not None
    )


def quant_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized layers of a prepared model, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def _default_grid(module: object, quantization: Quantization) -> LayerGrid:
    if isinstance(module, nn.Embedding):
        return LayerGrid(quantization.embeddings.scheme if quantization.embeddings else None, None)
    return LayerGrid(
        quantization.weights.scheme if quantization.weights else None,
        quantization.activations.scheme if quantization.activations else None,
    )


def _check_group(name: str, module: object, scheme: Scheme | None) -> None:
    weight = getattr(module, "weight", None)
    assert isinstance(weight, nn.Parameter)
    if scheme is None:
        return
    try:
        scheme.block_size(weight[0].numel())
    except ValueError as error:
        raise UserError(f"quantization: layer {name}: {error}") from None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern) for pattern in patterns
    )
