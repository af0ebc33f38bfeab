"""Calibration text through the decoder, one block at a time.

Only the inputs of one block are held: the text is embedded once, then each block maps its inputs to the next
block's. Memory is that of one block's activations for the whole calibration text (for 64 × 512 tokens of
SmolLM2-135M: 75 MB between blocks, about 1 GB inside one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.quantize.modules import QuantizedWeight

# Token rows that are embedded at a time.
_EMBED_ROWS = 8
# Panels of columns in which a Hessian's upper triangle is computed.
_PANELS = 4


def spread_blocks(train: Blocks, count: int) -> Tensor:
    """Calibration text: `count` blocks at even distances, so that every part of the text has its say.

    Args:
        train: training blocks `[blocks, block_size]`.
        count: how many to take; all if there are fewer.
    """
    if count >= len(train):
        return train[:]
    return train[torch.linspace(0, len(train) - 1, count).round().long()]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the module list that holds most of the model's parameters.

    Raises:
        ValueError: if the model has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks to calibrate one by one")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    calibration: Tensor,
    on_input: Callable[[nn.Module, Tensor], None],
    after_block: Callable[[nn.Module], None] | None = None,
) -> None:
    """Send calibration text through the blocks, first to last, and show every linear its input.

    Args:
        model: a causal language model of transformers.
        calibration: token ids `[n, block]`.
        on_input: called with each linear and its input `[n, block, K]` just before the linear computes; it
            may change the linear, and what follows sees the change.
        after_block: called with each block when the text went through it.
    """
    was_training = model.training
    model.eval()
    blocks = decoder_blocks(model)
    hidden, arguments = first_inputs(model, blocks[0], calibration)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        on_input(layer, inputs[0])

    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        handles = [linear.register_forward_pre_hook(hook) for linear in linears]
        try:
            hidden = block_output(block, hidden, arguments)
        finally:
            for handle in handles:
                handle.remove()
        if after_block is not None:
            after_block(block)
    model.train(was_training)


def block_output(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A block's outputs `[n, block, hidden]` for inputs of that shape and the arguments of `first_inputs`."""
    result = block(hidden, **arguments)
    return result[0] if isinstance(result, tuple) else result


class _ReachedBlocksError(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def first_inputs(model: nn.Module, block: nn.Module, calibration: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings of all the text `[n, block, hidden]`, and the other arguments a block is called with.

    Those (positions, mask) come from a single row, and so broadcast over any number of rows.
    """
    device = next(model.parameters()).device
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else arguments.pop("hidden_states")
        caught.append((hidden, arguments))
        raise _ReachedBlocksError

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for rows in (calibration[:1], *calibration.split(_EMBED_ROWS)):
            try:
                model(input_ids=rows.to(device), use_cache=False)
            except _ReachedBlocksError:
                continue
    finally:
        handle.remove()
    (_, arguments), *batches = caught
    return torch.cat([hidden for hidden, _ in batches]), arguments


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Switch the quantization of a prepared model off, as long as the context lasts."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedWeight)]
    states = [(layer.quantize_weights, layer.quantize_activations) for layer in layers]
    for layer in layers:
        layer.quantize_weights = layer.quantize_activations = False
    try:
        yield
    finally:
        for layer, (weights, activations) in zip(layers, states, strict=True):
            layer.quantize_weights, layer.quantize_activations = weights, activations


def hessian_of(inputs: Tensor) -> Tensor:
    """Mean of `x xᵀ` over all tokens, the Hessian of a linear's squared output error up to a factor 2.

    Args:
        inputs: `[..., K]`.

    Returns:
        fp32 `[K, K]`, symmetric. Only the upper triangle is computed, in panels.
    """
    tokens = inputs.reshape(-1, inputs.shape[-1]).float()
    features = tokens.shape[1]
    hessian = torch.empty(features, features, dtype=torch.float32, device=tokens.device)
    width = -(-features // _PANELS)
    for start in range(0, features, width):
        end = min(start + width, features)
        panel = tokens[:, start:end].t() @ tokens[:, start:]
        hessian[start:end, start:] = panel
        hessian[start:, start:end] = panel.t()
    return hessian / len(tokens)
