"""Block by block before end to end: each decoder block learns to give what the full-precision block gives.

EfficientQAT's first phase (Chen et al., arXiv:2407.11062, section 3.2): weights and scales of one block at a
time are trained with the mean squared error against the full-precision block's outputs, and its inputs are
those that the quantized blocks before it give. One block's gradients and optimizer state are held at a time,
so it costs little memory, and below 4 bits it brings the model to where training end to end can work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.loop.optimizer import build_optimizer
from qatapult.trainer.loop.schedules import rate_factor
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.quantize.ptq.calibration import (
    block_output,
    decoder_blocks,
    first_inputs,
    spread_blocks,
)
from qatapult.trainer.recipe.schema import Recipe


def train_blockwise(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Blocks,
    recipe: Recipe,
    say: Callable[[str], None],
) -> list[tuple[float, float]]:
    """Train the quantized linears of every block in place, first block to last.

    Processes that start from the same model and text come to the same result: nothing is random.

    Args:
        model: a prepared model, on its device.
        teacher: the full-precision model of the same structure, on the same device. (The prepared model's own
            weights are no longer those, once GPTQ has changed them.)
        train: token ids `[blocks, block_size]`.
        recipe: `qat.blockwise_tokens` is the length, all blocks of the model seeing the same tokens;
            `qat.batch_size` and `qat.optimizer` are those of the training.
        say: where progress goes.

    Returns:
        For each block, the mean squared error before and after.
    """
    rows = max(1, round(recipe.qat.blockwise_tokens / train.shape[1]))
    text = spread_blocks(train, rows)
    passes = -(-rows // len(text))
    device = next(model.parameters()).device
    model.eval()
    quantized, arguments = first_inputs(model, decoder_blocks(model)[0], text.to(device))
    exact, exact_arguments = first_inputs(teacher, decoder_blocks(teacher)[0], text.to(device))
    errors = []
    pairs = list(zip(decoder_blocks(model), decoder_blocks(teacher), strict=True))
    for index, (block, original) in enumerate(pairs):
        with torch.no_grad():
            exact = _in_batches(original, exact, exact_arguments, recipe.qat.batch_size)
        before = _error(block, quantized, exact, arguments, recipe.qat.batch_size)
        _train_block(block, quantized, exact, arguments, recipe, passes)
        after = _error(block, quantized, exact, arguments, recipe.qat.batch_size)
        errors.append((before, after))
        say(f"  block {index + 1}/{len(pairs)}: error {before:.3g} → {after:.3g}")
        with torch.no_grad():
            quantized = _in_batches(block, quantized, arguments, recipe.qat.batch_size)
    return errors


def _train_block(
    block: nn.Module, inputs: Tensor, targets: Tensor, arguments: dict[str, Any], recipe: Recipe, passes: int
) -> None:
    """AdamW on one block's quantized layers; keeps what it began with if training made it worse."""
    if not quant_layers(block):
        return
    size = recipe.qat.batch_size
    begun = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    first = _error(block, inputs, targets, arguments, size)
    trained = [p for layer in quant_layers(block).values() for p in layer.parameters(recurse=False)]
    block.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    steps = passes * -(-len(inputs) // size)
    optimizer = build_optimizer(block, recipe, steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = 0
    for _ in range(passes):
        for rows, goal in zip(inputs.split(size), targets.split(size), strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_factor(recipe.qat.optimizer, step, steps)
            # Relative to the targets' size, so that the clipping of gradients means the same in every block.
            loss = mse_loss(block_output(block, rows, arguments), goal) / goal.square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, recipe.qat.optimizer.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    if not _error(block, inputs, targets, arguments, size) <= first:
        block.load_state_dict(begun)


@torch.no_grad()
def _error(block: nn.Module, inputs: Tensor, targets: Tensor, arguments: dict[str, Any], size: int) -> float:
    """Mean squared error of a block's outputs."""
    total = sum(
        float((block_output(block, rows, arguments) - goal).square().sum())
        for rows, goal in zip(inputs.split(size), targets.split(size), strict=True)
    )
    return total / targets.numel()


def _in_batches(block: nn.Module, inputs: Tensor, arguments: dict[str, Any], size: int) -> Tensor:
    return torch.cat([block_output(block, rows, arguments) for rows in inputs.split(size)])
