"""The functions of `ops.py` in plain torch, rounded where transformers rounds them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)`; see `ops.rms_norm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`; see `ops.silu_product`."""
    return silu(gate) * up


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention; see `ops.attention`."""
    repeats, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return scaled_dot_product_attention(query, key, value, seen, scale=scale).transpose(1, 2)
