"""Keys and values of attention in int8 or int4: one scale a token and head, as in LLM-QAT
(arXiv:2305.17888, section 3).

The grid is that of per-token activations with the head's features as the row, so training
(`fake_quantize_kv`) and serving (`quantize_kv`, `dequantize_kv`) agree bit for bit. Quantize keys after the
rotary embedding, as they are cached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatapult.kernels.fake_quant.dynamic import fake_quantize_dynamic, quantize_dynamic
from qatapult.kernels.grid import dequantize
from qatapult.kernels.packing import pack, unpack
from qatapult.kernels.scheme import Scheme


def kv_scheme(bits: int, symmetric: bool = True) -> Scheme:
    """Grid of a cache: 8 or 4 bits, one scale for each token and head, stored in fp16.

    Raises:
        ValueError: for other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} of the KV cache must be 4 or 8")
    return Scheme(bits=bits, granularity="token", symmetric=symmetric, scale_dtype="float16")


def quantize_kv(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys or values as they lie in the cache.

    Args:
        x: fp32, bf16 or fp16, [..., D] with D features of a head: usually [batch, heads, tokens, D].
        scheme: of `kv_scheme`.

    Returns:
        Packed codes, uint8 [..., D · bits / 8]; scales, fp16 [..., 1]; zero points, int8 [..., 1], or None.

    Raises:
        ValueError: for a scheme that is not per token.
    """
    _check(scheme)
    codes, scale, zero_point = quantize_dynamic(x.detach(), scheme)
    return pack(codes, scheme), scale.half(), None if zero_point is None else zero_point.to(torch.int8)


def dequantize_kv(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of what `quantize_kv` stored, [..., features] in `dtype`.

    Raises:
        ValueError: for a scheme that is not per token, or tensors that do not fit it.
    """
    _check(scheme)
    codes = unpack(packed, scheme, features)
    return dequantize(codes, scale.float(), None if zero_point is None else zero_point.float(), scheme, dtype)


def fake_quantize_kv(x: Tensor, scheme: Scheme) -> Tensor:
    """What comes back from the cache, with a straight-through gradient: for training.

    Args:
        x: [..., D].
        scheme: of `kv_scheme`.
    """
    _check(scheme)
    return fake_quantize_dynamic(x, scheme)


def _check(scheme: Scheme) -> None:
    if scheme.granularity != "token" or scheme.scale_dtype != "float16":
        raise ValueError(f"the KV cache takes a scheme of kv_scheme(), not {scheme.describe()}")
