"""QuaRot's offline part: random Hadamard rotations folded into the weights, then GPTQ (arXiv:2404.00456)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.quantize.ptq import gptq
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks
from qatapult.trainer.quantize.ptq.folding import choose_ranges_again, folds_of
from qatapult.trainer.quantize.ptq.rotation import fold_norms, random_hadamard, rotate
from qatapult.trainer.recipe import schema

_SEED = 0


def quantize(
    model: PreTrainedModel, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Rotate a prepared model in place, choose the scales anew, and run GPTQ.

    Tied embeddings come apart: afterwards the output head has a weight of its own.

    Args:
        model: a prepared model with LLaMA-class blocks.
        calibration: token ids `[n, block]`.
        settings: GPTQ's.
        quantization: not needed here; every method takes it.

    Raises:
        UserError: for blocks of another structure.
    """
    rotate_randomly(model)
    choose_ranges_again(model)
    gptq.quantize(model, calibration, settings, quantization)


def rotate_randomly(model: PreTrainedModel) -> None:
    """Fold the norms, then turn the residual stream and the values of every head by Hadamard rotations."""
    generator = torch.Generator().manual_seed(_SEED)
    fold_norms(model)
    blocks = decoder_blocks(model)
    _, values, _, _ = folds_of(blocks[0])
    heads = [random_hadamard(values.head_dim, generator) for _ in blocks]
    rotate(model, random_hadamard(model.config.hidden_size, generator), heads)
