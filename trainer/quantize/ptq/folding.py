"""Where a factor can move between a layer's output channels and the next layer's input channels for nothing.

In a LLaMA-class block four places are linear in between: from each norm into the linears that read it, from
the values (`v_proj`) through the attention's average into `o_proj`, and from `up_proj` through the product
with the gate into `down_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatapult.kernels import choose_range
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.recipe.errors import UserError


@dataclass(frozen=True)
class Fold:
    """One such place.

    Attributes:
        producer: norm or linear whose output channels take the inverse factor.
        consumers: linears whose input channels take the factor.
        head_dim: for values that several query heads share, the channels of a head; else 0.
        repeats: query heads that share a value head.
    """

    producer: nn.Module
    consumers: tuple[nn.Linear, ...]
    head_dim: int = 0
    repeats: int = 1

    def shared(self, per_channel: Tensor) -> Tensor:
        """Largest of a statistic over the consumers' channels that come from one channel of the producer.

        Args:
            per_channel: `[K]`.

        Returns:
            `[K]`, with equal values for channels that must have equal factors.
        """
        if self.repeats == 1:
            return per_channel
        heads = per_channel.view(-1, self.repeats, self.head_dim)
        return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)

    @torch.no_grad()
    def apply(self, factor: Tensor) -> None:
        """Multiply the consumers' inputs with `factor` `[K]` and divide the producer's outputs by it."""
        for consumer in self.consumers:
            consumer.weight.mul_(factor.to(consumer.weight.dtype))
        produced = factor
        if self.repeats > 1:
            produced = factor.view(-1, self.repeats, self.head_dim)[:, 0].reshape(-1)
        weight, bias = self.producer.weight, getattr(self.producer, "bias", None)
        assert isinstance(weight, nn.Parameter)
        inverse = (1 / produced).to(weight.dtype)
        weight.mul_(inverse.unsqueeze(1) if weight.ndim == 2 else inverse)
        if isinstance(bias, nn.Parameter):
            bias.mul_(inverse)


def folds_of(block: nn.Module) -> Iterator[Fold]:
    """The places of a LLaMA-class decoder block.

    Raises:
        UserError: if the block has other parts or other names.
    """
    try:
        attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
        query, key, value, output = (_linear(attention, f"{name}_proj") for name in "qkvo")
        gate, up, down = (_linear(mlp, f"{name}_proj") for name in ("gate", "up", "down"))
        first, second = (
            block.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm")
        )
    except AttributeError as error:
        raise UserError(
            f"ptq: {type(block).__name__} is not built like a LLaMA block ({error}); "
            "awq, smoothquant and hadamard need one: use rtn or gptq"
        ) from None
    # The norm of Gemma multiplies with 1 + weight.
    if not (_multiplies_with_weight(first) and _multiplies_with_weight(second)):
        raise UserError(f"ptq: {type(first).__name__} does not multiply with its weight: use rtn or gptq")
    yield Fold(first, (query, key, value))
    repeats = output.in_features // value.out_features
    yield Fold(value, (output,), int(getattr(attention, "head_dim", 0)), repeats)
    yield Fold(second, (gate, up))
    yield Fold(up, (down,))


@torch.no_grad()
def choose_ranges_again(model: nn.Module) -> None:
    """Choose every layer's scales anew, after its weights changed."""
    for layer in model.modules():
        if isinstance(layer, QuantizedWeight) and layer.weight_scheme is not None:
            set_range(layer, *choose_range(layer.weight_matrix(), layer.weight_scheme))


@torch.no_grad()
def set_range(layer: QuantizedWeight, scale: Tensor, zero_point: Tensor | None) -> None:
    """Overwrite a layer's scale and zero point."""
    assert layer.weight_scale is not None
    layer.weight_scale.copy_(scale)
    if zero_point is not None and layer.weight_zero_point is not None:
        layer.weight_zero_point.copy_(zero_point)


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    layer = parent.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise AttributeError(f"{name} is a {type(layer).__name__}")
    return layer


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight


@torch.no_grad()
def _multiplies_with_weight(norm: nn.Module) -> bool:
    weight = _weight(norm)
    # Equal and large, so that they are normalized to ones whatever the epsilon.
    return torch.allclose(norm(torch.full_like(weight, 1e4)), weight, rtol=1e-2, atol=1e-4)
