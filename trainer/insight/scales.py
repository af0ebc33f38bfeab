"""How scales moved in training, and which layers still cost most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import perplexity
from qatapult.trainer.quantize.modules import QuantizedWeight

#: A scale has moved if it changed by more than this share.
MOVED = 0.05


@torch.no_grad()
def scale_moves(before: Tensor, after: Tensor) -> dict[str, float]:
    """How one layer's scales changed.

    Args:
        before: scales that training started from.
        after: scales at its end, the same shape.

    Returns:
        `mean` and `spread` of log2(after / before), and `moved`, the share that changed by more than `MOVED`.
    """
    ratio = (after.float() / before.float()).clamp(min=1e-12)
    logs = ratio.log2()
    return {
        "mean": float(logs.mean()),
        "spread": float(logs.std()) if logs.numel() > 1 else 0.0,
        "moved": float(((ratio - 1).abs() > MOVED).float().mean()),
    }


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by decoder block and by role: `{"block 3": […], "down_proj": […]}`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        index = next((part for part in parts if part.isdigit()), None)
        if index is not None:
            groups.setdefault(f"block {index}", []).append(name)
        groups.setdefault(parts[-1], []).append(name)
    return groups


def ablation(
    model: PreTrainedModel,
    layers: Mapping[str, QuantizedWeight],
    blocks: Tensor,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What each group of layers still costs: how far the perplexity falls when its quantization is switched
    off.

    Args:
        model: prepared.
        layers: its quantized layers.
        blocks: token ids, int64 `[blocks, S]`.
        on_progress: called with the number of groups done.

    Returns:
        `{"perplexity": with everything quantized, "groups": [{"name", "layers", "perplexity", "cost"}, …]}`,
        most costly first; `cost` is the fall of the mean loss in nats a token, negative where switching off
        does harm.
    """
    documents = torch.zeros_like(blocks)
    whole = perplexity(model, blocks, documents).value
    groups = []
    for done, (name, members) in enumerate(layer_groups(layers).items(), start=1):
        with switched_off([layers[member] for member in members]):
            without = perplexity(model, blocks, documents).value
        cost = float(torch.tensor(whole / without, dtype=torch.float64).log())
        groups.append({"name": name, "layers": len(members), "perplexity": without, "cost": cost})
        if on_progress:
            on_progress(done)
    return {"perplexity": whole, "groups": sorted(groups, key=lambda group: -float(str(group["cost"])))}


@contextmanager
def switched_off(layers: Iterable[QuantizedWeight]) -> Iterator[None]:
    """Quantization off in some layers: latent weights and inputs as they are."""
    held = [(layer, layer.quantize_weights, layer.quantize_activations) for layer in layers]
    for layer, _, _ in held:
        layer.quantize_weights = layer.quantize_activations = False
    try:
        yield
    finally:
        for layer, weights, activations in held:
            layer.quantize_weights, layer.quantize_activations = weights, activations
