"""Norm, gate and attention of a decoder in one pass each: `layer.cpp` and `attention.cpp`, or plain torch.

For inference: no gradient flows. They are called directly, not as registered operators, whose dispatch would take
longer than the work of one token.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.common.cpp import load
from qatapult.kernels.decoder import reference

#: Numbers of the dtypes that the compiled code takes.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension; the quotient is rounded to x's dtype first.

    Args:
        x: fp32, bf16 or fp16, [..., D].
        weight: [D], of the same dtype.
        eps: added to the mean.
    """
    library = _compiled(layer_library(), x, weight)
    if library is None:
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    rows = x.numel() // max(1, size)
    library.qatapult_rms_norm(DTYPES[x.dtype], *pointers, rows, size, eps, torch.get_num_threads())
    return y


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, silu rounded to the dtype before the product.

    Args:
        gate: fp32, bf16 or fp16, [..., I].
        up: as gate.
    """
    library = _compiled(layer_library(), gate, up)
    if library is None:
        return reference.silu_product(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    y, size = torch.empty_like(gate), gate.shape[-1]
    pointers = (gate.data_ptr(), up.data_ptr(), y.data_ptr())
    rows = gate.numel() // max(1, size)
    library.qatapult_silu_product(DTYPES[gate.dtype], *pointers, rows, size, torch.get_num_threads())
    return y


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention in fp32 arithmetic: the last query sees all keys, each one before it one fewer.

    Args:
        query: fp32 or bf16, [B, H, S, D].
        key: of the same dtype, [B, G, T, D], T ≥ S; G divides H, each key head serves H / G query heads.
        value: as key.
        scale: of the scores.

    Returns:
        [B, S, H, D].
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    library = _compiled(_attention_library(), query, key, value)
    if library is None:
        return reference.attention(query, key, value, scale)
    batch, heads, queries, size = query.shape
    y = query.new_empty(batch, queries, heads, size)
    sizes = (_LONG * 6)(batch, heads, key.shape[1], queries, key.shape[2], size)
    strides = (_LONG * 9)(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), sizes, strides, y.data_ptr())
    library.qatapult_attention(DTYPES[query.dtype], *pointers, scale, torch.get_num_threads())
    return y


def _compiled(library: ctypes.CDLL | None, *tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it takes these tensors."""
    first = tensors[0]
    if library is None or first.dtype not in DTYPES or backend_for(first) != "cpu" or not first.numel():
        return None
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return None
    return None if first.shape[-1] % library.qatapult_lanes() else library


@functools.cache
def layer_library() -> ctypes.CDLL | None:
    """`layer.cpp`, compiled."""
    library = load(Path(__file__).with_name("layer.cpp"))
    if library is not None:
        shared = (_POINTER, _POINTER, _POINTER, _LONG, _LONG)
        library.qatapult_rms_norm.argtypes = (_INT, *shared, _FLOAT, _INT)
        library.qatapult_silu_product.argtypes = (_INT, *shared, _INT)
        project = (_INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT)
        library.qatapult_layer_project.argtypes = (_POINTER, *project)
        library.qatapult_layer_finish.argtypes = (_POINTER, _INT, *(_POINTER,) * 3, _LONG, _INT)
        for name in ("rms_norm", "silu_product", "layer_project", "layer_finish"):
            getattr(library, f"qatapult_{name}").restype = None
    return library


@functools.cache
def _attention_library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("attention.cpp"), contract=True)
    if library is not None:
        library.qatapult_attention.argtypes = (_INT, *(_POINTER,) * 6, _FLOAT, _INT)
        library.qatapult_attention.restype = None
    return library
