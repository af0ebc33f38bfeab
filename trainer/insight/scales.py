"""How scales moved in training, and which layers still cost most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.blocks import hidden_from_block, keeping_inputs
from qatapult.trainer.evaluate.perplexity import device_of, last_hidden, losses_of_hidden
from qatapult.trainer.quantize.modules import QuantizedWeight

#: A scale has moved if it changed by more than this share.
MOVED = 0.05
#: Decoder blocks that the ablation tries; of a deeper model an even sample.
MOST_BLOCKS = 32
#: Blocks of text that it runs: costs are differences on the same tokens, which few of them tell apart.
ABLATION_BLOCKS = 2


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


@torch.no_grad()
def ablation(
    model: PreTrainedModel,
    layers: Mapping[str, QuantizedWeight],
    ids: Tensor,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What each group of layers still costs: how far the perplexity falls when its quantization is switched
    off.

    What enters each decoder block is kept, so that a group costs only the blocks from its first one on.

    Args:
        model: prepared.
        layers: its quantized layers.
        ids: token ids, int64 `[blocks, S]`, all at a time.
        on_progress: called with the number of groups done.

    Returns:
        `{"perplexity": with everything quantized, "tokens": looked at, "blocks": decoder blocks there are,
        "blocks_tried": of them, "groups": [{"name", "layers", "perplexity", "cost"}, …]}`, most costly first;
        `cost` is the fall of the mean loss in nats a token, negative where switching off does harm.
    """
    ids = ids.to(device_of(model))
    with keeping_inputs(model) as entering:
        whole = _mean_loss(model, last_hidden(model, ids), ids)
    wanted = sampled_groups(layer_groups(layers), MOST_BLOCKS)
    groups = []
    for done, (name, members) in enumerate(wanted.items(), start=1):
        start = _first_block(members)
        with switched_off([layers[member] for member in members]):
            hidden = (
                last_hidden(model, ids) if start is None else hidden_from_block(model, start, entering[start])
            )
        without = _mean_loss(model, hidden, ids)
        groups.append(
            {"name": name, "layers": len(members), "perplexity": math.exp(without), "cost": whole - without}
        )
        if on_progress:
            on_progress(done)
    return {
        "perplexity": math.exp(whole),
        "tokens": ids.numel(),
        "blocks": len(entering),
        "blocks_tried": sum(name.startswith("block ") for name in wanted),
        "groups": sorted(groups, key=lambda group: -float(str(group["cost"]))),
    }


def sampled_groups(groups: Mapping[str, list[str]], most_blocks: int) -> dict[str, list[str]]:
    """All roles, and at most so many decoder blocks, evenly spread with the first and the last."""
    blocks = [name for name in groups if name.startswith("block ")]
    if len(blocks) > most_blocks:
        kept = {blocks[round(i * (len(blocks) - 1) / (most_blocks - 1))] for i in range(most_blocks)}
        blocks = [name for name in blocks if name in kept]
    return {
        name: members for name, members in groups.items() if not name.startswith("block ") or name in blocks
    }


def _first_block(members: Iterable[str]) -> int | None:
    """Index of the first decoder block that holds one of the layers; None where one is outside of all."""
    found = [next((int(part) for part in name.split(".") if part.isdigit()), None) for name in members]
    inside = [index for index in found if index is not None]
    return min(inside) if len(inside) == len(found) else None


def _mean_loss(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> float:
    return float(losses_of_hidden(model, hidden, ids).mean(dtype=torch.float64))


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
