"""Text from a model at work, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qatapult.trainer.evaluate.perplexity import device_of
from qatapult.trainer.quantize.kv_cache import PackedKVCache
from qatapult.trainer.recipe.schema import TensorScheme


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        tokens: at most so many.
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely tokens that have this probability together.
        seed: of the draws.
    """

    tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What was written.

    Attributes:
        text: without the prompt.
        prompt_tokens: how many tokens the prompt has.
        tokens: how many were written.
        prefill_seconds: until the first token.
        seconds: altogether.
        cache_bytes: of the KV cache at the end.
    """

    text: str
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    seconds: float
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, after the first token."""
        return (self.tokens - 1) / max(self.seconds - self.prefill_seconds, 1e-9)


class _Stream(TextStreamer):
    """Hands text on as soon as it is certain, and notes when the first token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._calls = 0
        self.pieces: list[str] = []
        self.first = 0.0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._show(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    sampling: Sampling = Sampling(),
    show: Callable[[str], None] = lambda text: None,
    kv_cache: TensorScheme | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model: a causal language model, packed or not, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: token ids, int64 `[S]`.
        sampling: how tokens are chosen.
        show: gets pieces of text as they come.
        kv_cache: the grid of cached keys and values; full precision if absent.
    """
    cache: Cache = PackedKVCache(kv_cache.scheme) if kv_cache is not None else DynamicCache()
    stream = _Stream(tokenizer, show)
    ids = prompt[None].to(device_of(model))
    torch.manual_seed(sampling.seed)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    start = time.perf_counter()
    with torch.inference_mode():
        written = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            streamer=stream,
            past_key_values=cache,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **options,
        )
    return Generated(
        text="".join(stream.pieces),
        prompt_tokens=ids.shape[1],
        tokens=written.shape[1] - ids.shape[1],
        prefill_seconds=stream.first - start,
        seconds=time.perf_counter() - start,
        cache_bytes=_cache_bytes(cache),
    )


def _cache_bytes(cache: Cache) -> int:
    if isinstance(cache, PackedKVCache):
        return cache.nbytes
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
