"""Attention of a training step on the CPU.

torch's fused attention there is quick forward, but its backward in bf16 takes three to six times as long as the
products that it stands for (9 heads of 64 on two Zen 4 cores: 29 ms a layer against 9 for 4 sequences of 256 tokens,
56 against 9 for one of 512), so short sequences are attended to by products and a softmax while gradients are needed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "qatapult_composed"
#: Probabilities are kept for the backward pass: beyond this many tokens their square costs too much memory.
LONGEST = 512


def compose_attention(model: nn.Module) -> None:
    """Let a model on the CPU attend by products while it trains; its name for attention changes, nothing else.

    Models that do not let their attention be chosen, or have chosen another than torch's fused one, are left alone.
    """
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        return
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = _NAME


def composed_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of grouped query heads, differentiable.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, G, S, D]`; every `H / G` query heads share one of its heads.
        value: `[B, G, S, D]`.
        scaling: of the scores.

    Returns:
        `[B, H, S, D]` in the dtype of query; the softmax sums in fp32.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    rows = (query * scaling).reshape(batch, groups, -1, size)
    scores = (rows @ key.transpose(2, 3)).view(batch, heads, length, length)
    chances = (scores + _future(length, scores.dtype)).softmax(-1)
    return (chances.view(batch, groups, -1, length) @ value).view(batch, heads, length, size)


@functools.lru_cache(maxsize=4)
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """What hides later keys when it is added to the scores."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: `[B, S, H, D]`, and no weights."""
    length, size = query.shape[2:]
    trains = torch.is_grad_enabled() and query.requires_grad
    causal = attention_mask is None and key.shape[2] == length and getattr(module, "is_causal", True)
    if not (trains and causal and length <= LONGEST) or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    values = composed_attention(query, key, value, size**-0.5 if scaling is None else scaling)
    return values.transpose(1, 2).contiguous(), None
