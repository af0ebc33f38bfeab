"""Running a decoder from one of its blocks on, with hidden states that were kept there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import decoder
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks


@contextmanager
def keeping_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, every call of the decoder appends what enters each block, `[B, S, D]`."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Tensor]) -> None:
        kept.append(inputs[0] if inputs else arguments["hidden_states"])

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in decoder_blocks(model)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def hidden_from_block(model: PreTrainedModel, start: int, entering: Tensor) -> Tensor:
    """Hidden states after the final norm, from those that enter block `start`: `[B, S, D]` to `[B, S, D]`."""
    body, blocks = decoder(model), decoder_blocks(model)
    name = next(name for name, child in body.named_children() if child is blocks)
    setattr(body, name, blocks[start:])
    try:
        states: Tensor = body(inputs_embeds=entering, use_cache=False).last_hidden_state
    finally:
        setattr(body, name, blocks)
    return states
