"""Keys and values in 8 or 4 bits, each token of each head with a scale of its own.

In training and evaluation they pass through the grid inside attention (as LLM-QAT, arXiv:2305.17888, section
3.2: after the rotary embedding, where a cache would store them). In generation a cache holds the packed
codes. Both give the same values, since a token is quantized once, when it comes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qatapult.kernels import Scheme, choose_range, dequantize, fake_quantize_dynamic, pack, quantize, unpack
from qatapult.trainer.recipe.errors import UserError

_PREFIX = "qatapult_kv"
# Marks what a cache hands out: it went through the grid when it was stored.
_STORED = "_qatapult_stored"


def quantize_kv_cache(model: nn.Module, scheme: Scheme) -> None:
    """Let a model's attention see keys and values as the grid represents them.

    The gradient passes straight through. Nothing is added to the model but the name of its attention.

    Args:
        model: a transformers model whose attention goes through its attention interface.
        scheme: per token, any bits that pack.

    Raises:
        UserError: for another granularity, or a model that does not let its attention be chosen.
    """
    if scheme.granularity != "token":
        raise UserError(f"quantization.kv_cache.granularity '{scheme.granularity}' must be 'token'")
    if not isinstance(model, PreTrainedModel) or not model._supports_attention_backend:
        raise UserError(f"quantization.kv_cache: {type(model).__name__} does not let its attention be chosen")
    base = model.config._attn_implementation
    if base.startswith(_PREFIX):
        base = base.rpartition(":")[2]
    name = f"{_PREFIX}_{scheme.bits:g}{'' if scheme.symmetric else 'a'}:{base}"
    attention = ALL_ATTENTION_FUNCTIONS[base]

    def quantized_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> Any:
        if not getattr(key, _STORED, False):
            key, value = fake_quantize_dynamic(key, scheme), fake_quantize_dynamic(value, scheme)
        return attention(module, query, key, value, mask, **more)

    AttentionInterface.register(name, quantized_attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation = name


class PackedKVCache(Cache):
    """A cache of packed codes for `generate(past_key_values=…)`.

    Args:
        scheme: the grid, per token.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(layers=[])
        self._scheme = scheme
        self._packed: list[_PackedLayer] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return all of them, as the grid represents them, `[B, H, S, D]`."""
        while len(self._packed) <= layer_idx:
            self._packed.append(_PackedLayer(self._scheme))
            self.layers.append(self._packed[-1])
        return self._packed[layer_idx].update(key_states, value_states)

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return sum(layer.nbytes for layer in self._packed)


class _Packed:
    """Packed codes of keys or of values, growing along the tokens."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.tensors: list[Tensor | None] = [None, None, None]
        self.features = 0

    def append(self, states: Tensor) -> Tensor:
        """Add tokens `[B, H, s, D]`; all tokens as the grid represents them."""
        scale, zero_point = choose_range(states, self.scheme)
        codes = pack(quantize(states, scale, zero_point, self.scheme), self.scheme)
        self.features = states.shape[-1]
        for index, new in enumerate((codes, scale, zero_point)):
            old = self.tensors[index]
            self.tensors[index] = new if old is None or new is None else torch.cat([old, new], dim=-2)
        return self.values(states.dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        packed, scale, zero_point = self.tensors
        assert packed is not None
        assert scale is not None
        codes = unpack(packed, self.scheme, self.features)
        return dequantize(codes, scale, zero_point, self.scheme, dtype)

    def select(self, index: Any) -> None:
        self.tensors = [None if tensor is None else tensor[index] for tensor in self.tensors]


class _PackedLayer(DynamicLayer):
    """One layer of the cache. Its `keys` are the packed ones, so that lengths are found as always."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self._scheme = scheme

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = _Packed(self._scheme), _Packed(self._scheme)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._keys.append(key_states), self._values.append(value_states)
        self._show()
        setattr(keys, _STORED, True)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.is_initialized:
            self._select((Ellipsis, slice(None, -abs(tokens_to_remove)), slice(None)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        assert self.keys is not None
        self._select(torch.arange(len(self.keys), device=self.device).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        tensors = [*self._keys.tensors, *self._values.tensors] if self.is_initialized else []
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _select(self, index: Any) -> None:
        if self.is_initialized:
            self._keys.select(index)
            self._values.select(index)
            self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys.tensors[0], self._values.tensors[0]
