"""Block by block before end to end: each decoder block learns to give what the full-precision block gives.

EfficientQAT's first phase (Chen et al., arXiv:2407.11062, section 3.2): weights and scales of one block at a
time are trained with the mean squared error against the full-precision block's outputs, and its inputs are
those that the quantized blocks before it give. One block's gradients and optimizer state are held at a time,
so it costs little memory, and below 4 bits it brings the model to where training end to end can work.
`blockwise_disk` does the same with blocks and activations on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

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


class Rows(Protocol):
    """Activations of all the text, `[rows, tokens, features]`, of which a slice is a tensor on the device."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


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
    text, passes = text_and_passes(train, recipe)
    device = next(model.parameters()).device
    model.eval()
    quantized, arguments = first_inputs(model, decoder_blocks(model)[0], text.to(device))
    exact, exact_arguments = first_inputs(teacher, decoder_blocks(teacher)[0], text.to(device))
    errors = []
    pairs = list(zip(decoder_blocks(model), decoder_blocks(teacher), strict=True))
    for index, (block, original) in enumerate(pairs):
        with torch.no_grad():
            exact = _in_batches(original, exact, exact_arguments, recipe.qat.batch_size)
        errors.append(train_block(block, quantized, exact, arguments, recipe, passes))
        say(describe(index, len(pairs), errors[-1]))
        with torch.no_grad():
            quantized = _in_batches(block, quantized, arguments, recipe.qat.batch_size)
    return errors


def text_and_passes(train: Blocks, recipe: Recipe) -> tuple[Tensor, int]:
    """Token ids that the blocks see, `[rows, block_size]`, and how often they see them."""
    rows = max(1, round(recipe.qat.blockwise_tokens / train.shape[1]))
    text = spread_blocks(train, rows)
    return text, -(-rows // len(text))


def describe(index: int, blocks: int, errors: tuple[float, float]) -> str:
    """A line of progress."""
    before, after = errors
    return f"  block {index + 1}/{blocks}: error {before:.3g} → {after:.3g}"


def train_block(
    block: nn.Module, inputs: Rows, targets: Rows, arguments: dict[str, Any], recipe: Recipe, passes: int
) -> tuple[float, float]:
    """AdamW on one block's quantized layers; keeps what it began with if training made it worse.

    Args:
        block: a prepared model's decoder block, on its device.
        inputs: what the blocks before it give.
        targets: what the full-precision model's block gives.
        arguments: the other arguments that the block is called with.
        recipe: batch size and optimizer.
        passes: over the inputs.

    Returns:
        Mean squared error before and after.
    """
    size = recipe.qat.batch_size
    before = _error(block, inputs, targets, arguments, size)
    if not quant_layers(block):
        return before, before
    begun = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    _descend(block, inputs, targets, arguments, recipe, passes)
    after = _error(block, inputs, targets, arguments, size)
    if not after <= before:
        block.load_state_dict(begun)
        return before, before
    return before, after


def _descend(
    block: nn.Module, inputs: Rows, targets: Rows, arguments: dict[str, Any], recipe: Recipe, passes: int
) -> None:
    trained = [p for layer in quant_layers(block).values() for p in layer.parameters(recurse=False)]
    block.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    batches = _slices(inputs, recipe.qat.batch_size)
    steps = passes * len(batches)
    optimizer = build_optimizer(block, recipe, steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(recipe.qat.optimizer, step, steps)
        rows = batches[step % len(batches)]
        goal = targets[rows]
        # Relative to the targets' size, so that the clipping of gradients means the same in every block.
        loss = mse_loss(block_output(block, inputs[rows], arguments), goal) / goal.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.qat.optimizer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _error(block: nn.Module, inputs: Rows, targets: Rows, arguments: dict[str, Any], size: int) -> float:
    """Mean squared error of a block's outputs."""
    total, count = 0.0, 0
    for rows in _slices(inputs, size):
        goal = targets[rows]
        total += float((block_output(block, inputs[rows], arguments) - goal).square().sum())
        count += goal.numel()
    return total / count


def _slices(rows: Rows, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _in_batches(block: nn.Module, inputs: Tensor, arguments: dict[str, Any], size: int) -> Tensor:
    return torch.cat([block_output(block, rows, arguments) for rows in inputs.split(size)])
