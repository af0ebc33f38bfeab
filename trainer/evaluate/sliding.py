"""Perplexity with a sliding window: every token is judged with at least some context before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import device_of, token_losses


@torch.no_grad()
def sliding_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    window: int,
    stride: int,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Perplexity of one stream of text.

    Windows start every `stride` tokens; each judges only the tokens that the one before did not, so that
    every token but the first is judged once, with at least `window − stride` tokens before it (where there
    are so many).

    Args:
        model: a causal language model, packed or not, in evaluation mode.
        tokens: token ids, int64 `[T]`, at least 2.
        window: tokens the model sees at a time.
        stride: from 1 (slowest, lowest perplexity) to `window − 1`.
        on_progress: called with the number of tokens judged.

    Raises:
        ValueError: if the stride does not lie between 1 and `window − 1`.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be at least 1 and below the window of {window}")
    device = device_of(model)
    total, judged = 0.0, 0
    start = 0
    while judged < len(tokens) - 1:
        end = min(start + window, len(tokens))
        losses = token_losses(model, tokens[None, start:end].to(device))[0]
        fresh = end - 1 - judged
        total += float(losses[-fresh:].double().sum())
        judged += fresh
        start += stride
        if on_progress:
            on_progress(judged)
    return math.exp(total / judged)
