"""What rounding does to each layer's weights: cheap enough to be measured in every run."""

from __future__ import annotations

import torch
from torch import nn

from qatapult.trainer.quantize.prepare import quant_layers


@torch.no_grad()
def rounding(model: nn.Module) -> dict[str, dict[str, float]]:
    """Mean scale and relative rounding error of every layer whose weights are on a grid.

    Args:
        model: prepared; its weights may be the original ones or latent ones after training.

    Returns:
        `{layer: {"scale": mean scale, "error": ‖rounded − weight‖ / ‖weight‖}}`.
    """
    found = {}
    for name, layer in quant_layers(model).items():
        if layer.weight_scheme is None:
            continue
        difference = layer.fake_quantized_weight() - layer.weight
        error = difference.float().norm() / layer.weight.float().norm().clamp(min=1e-30)
        found[name] = {"scale": float(layer.grid()[0].float().mean()), "error": float(error)}
    return found
