"""Groups of layers that get the same grid, because a serving engine runs them as one kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

# The last part of a layer's name to the name of its fused form.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Layers that share a decision.

    Attributes:
        name: qualified name of the layer, or of the fused one it is part of.
        layers: qualified names of the linear layers.
        weights: number of their weights.
        shapes: `[N, K]` of each layer.
        block: index of the decoder block, or None outside of the blocks.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    shapes: tuple[tuple[int, int], ...]
    block: int | None


def find_groups(model: nn.Module, skip: Iterable[str], fused: bool = True) -> list[Group]:
    """The groups of a model's linear layers, in the model's order.

    Args:
        model: a full-precision model.
        skip: shell patterns of layers that are not quantized.
        fused: whether q/k/v, and gate/up, must agree because they are served as one kernel.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    patterns = tuple(skip)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _matches(name, patterns):
            continue
        parent, _, last = name.rpartition(".")
        shared = _FUSED.get(last, last) if fused else last
        key = f"{parent}.{shared}" if parent else shared
        members.setdefault(key, {})[name] = (module.out_features, module.in_features)
    return [_group(name, layers) for name, layers in members.items()]


def assignment_by_layer(groups: Iterable[Group], choice: Mapping[str, str]) -> dict[str, str]:
    """Candidate of every layer from the candidate of every group."""
    return {layer: choice[group.name] for group in groups for layer in group.layers}


def _group(name: str, layers: Mapping[str, tuple[int, int]]) -> Group:
    found = _BLOCK.search(name)
    return Group(
        name=name,
        layers=tuple(layers),
        weights=sum(rows * columns for rows, columns in layers.values()),
        shapes=tuple(layers.values()),
        block=int(found.group(1)) if found else None,
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(last, pattern) for pattern in patterns)
