"""Starting values of learned activation clips (PACT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.prepare import quant_layers


@torch.no_grad()
def calibrate_clips(model: nn.Module, blocks: Tensor) -> None:
    """Set every learned clip to the largest magnitude that its layer sees.

    Args:
        model: prepared; layers without a learned clip are left alone.
        blocks: token ids, int64 `[B, S]`.
    """
    layers = [layer for layer in quant_layers(model).values() if layer.activation_clip is not None]
    if not layers:
        return
    for layer in layers:
        assert layer.activation_clip is not None
        layer.activation_clip.zero_()
        layer.quantize_activations = False
    hooks = [layer.register_forward_pre_hook(_widen) for layer in layers]
    for ids in blocks.split(1):
        model(ids)
    for hook, layer in zip(hooks, layers, strict=True):
        hook.remove()
        layer.quantize_activations = True


def _widen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, QuantizedWeight)
    assert layer.activation_clip is not None
    layer.activation_clip.copy_(torch.maximum(layer.activation_clip, inputs[0].abs().max().float()))
