"""Shapes of LLaMA-class models by name, for random weights and for planning without a checkpoint."""

from __future__ import annotations

from typing import Any

#: Keyword arguments of `AutoConfig.for_model`. Sources: the checkpoints' own config.json.
RANDOM_SHAPES: dict[str, dict[str, Any]] = {}


def _llama(
    name: str, *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> None:
    RANDOM_SHAPES[name] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | more


_llama("tiny", hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, vocabulary=384, initializer_range=0.1)
_llama("tiny-tied", hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, vocabulary=384, initializer_range=0.1,
       tie_word_embeddings=True)  # fmt: skip
_llama("llama-60m", hidden=512, ffn=1376, layers=8, heads=8, kv_heads=8, vocabulary=32000)
_llama("smollm2-135m", hidden=576, ffn=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152,
       tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192)  # fmt: skip
_llama("llama-3.2-1b", hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256,
       tie_word_embeddings=True, rope_theta=500000.0)  # fmt: skip
_llama("llama-2-7b", hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000)
_llama("llama-2-13b", hidden=5120, ffn=13824, layers=40, heads=40, kv_heads=40, vocabulary=32000)
_llama("llama-2-70b", hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8, vocabulary=32000)
_llama("llama-3-8b", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256,
       rope_theta=500000.0)  # fmt: skip
