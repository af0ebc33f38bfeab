"""SmoothQuant: move the outliers of activations into the weights, where a per-channel grid can take them.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, equation 4: input channel j of a linear is multiplied with
`max|X_j|^α / max|W_j|^(1 − α)`, and the layer before is divided by it. Then the weights are rounded to
nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatapult.trainer.quantize.ptq.calibration import full_precision, walk_blocks
from qatapult.trainer.quantize.ptq.folding import Fold, choose_ranges_again, folds_of
from qatapult.trainer.recipe import schema

# Channels that hardly carry anything must not be blown up.
_SMALLEST = 1e-5


def quantize(
    model: nn.Module, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Smooth all decoder blocks of a prepared model in place and choose the scales anew.

    The statistics are those of the full-precision model, as published.

    Args:
        model: a prepared model with LLaMA-class blocks.
        calibration: token ids `[n, block]`.
        settings: `smoothing` is α.
        quantization: not needed here; every method takes it.

    Raises:
        UserError: for a block of another structure.
    """
    largest: dict[nn.Module, Tensor] = {}

    def on_input(layer: nn.Module, inputs: Tensor) -> None:
        largest[layer] = inputs.flatten(0, -2).abs().amax(0).float()

    def after_block(block: nn.Module) -> None:
        for fold in folds_of(block):
            fold.apply(smoothing_factor(fold, largest[fold.consumers[0]], settings.smoothing))
        largest.clear()

    with full_precision(model):
        walk_blocks(model, calibration, on_input, after_block)
    choose_ranges_again(model)


@torch.no_grad()
def smoothing_factor(fold: Fold, activations: Tensor, alpha: float) -> Tensor:
    """What the consumers' weights are multiplied with.

    Args:
        fold: the place.
        activations: `max|X_j|`, `[K]`.
        alpha: share of the activations' range that moves into the weights.

    Returns:
        fp32 `[K]`, positive.
    """
    weights = torch.stack([consumer.weight.abs().amax(0).float() for consumer in fold.consumers]).amax(0)
    activations, weights = fold.shared(activations), fold.shared(weights)
    return activations.clamp(min=_SMALLEST) ** alpha / weights.clamp(min=_SMALLEST) ** (1 - alpha)
