"""Low-rank adapters under quantization: the sum of weight and adapter is what the grid sees.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, with the adapter inside the
fake-quantizer (as in L4Q, arXiv:2402.04902): training sees the rounding of `W + B A`, and merging the adapter
at the end changes no code, so nothing is left beside the integers.

The base weights are frozen, so optimizer state and gradients are those of the adapters and the scales alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatapult.trainer.quantize.modules import QuantLinear

#: Names that adapters have beside a layer's weight.
DOWN, UP = "lora_down", "lora_up"


def add_adapters(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Give every quantized linear an adapter that is zero at first.

    `A` `[rank, K]` has entries of variance `1 / rank` and `B` `[N, rank]` is zero: then a step of `B` by the
    learning rate moves each weight by about the learning rate, as a step of the weight itself would, and
    rates carry over.

    Args:
        model: a prepared model.
        rank: of the adapters.
        seed: of `A`; every process draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _linears(model):
        rows, columns = layer.weight.shape
        down = torch.randn(rank, columns, generator=generator) / rank**0.5
        layer.register_parameter(DOWN, nn.Parameter(down.to(layer.weight)))
        layer.register_parameter(UP, nn.Parameter(layer.weight.new_zeros(rows, rank)))


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the adapters added to their weights and left out themselves."""
    result = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in (DOWN, UP)}
    for name, up in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == UP:
            weight = tensors[f"{layer}.weight"]
            result[f"{layer}.weight"] = weight + (up @ tensors[f"{layer}.{DOWN}"]).to(weight.dtype)
    return result


def _linears(model: nn.Module) -> list[QuantLinear]:
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantLinear) and layer.weight_scheme is not None
    ]
