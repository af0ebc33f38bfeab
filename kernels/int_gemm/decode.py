"""Products of a few tokens on processors without VNNI, where reading weights takes the time: `decode.cpp`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.common.cpp import load
from qatapult.kernels.common.launches import record
from qatapult.kernels.fake_quant import cpu
from qatapult.kernels.fake_quant.spec import Grid, RangeRule
from qatapult.kernels.int_gemm.weights import PreparedWeight
from qatapult.kernels.scheme import Scheme

#: Tokens up to which reading int8 beats the fp32 GEMM (AMD Zen 3, two threads), per channel and per group.
MOST_TOKENS, MOST_TOKENS_GROUPED = 8, 4


def suits(tokens: int, scale: Tensor) -> bool:
    """Whether so few tokens are better multiplied here, and the library exists."""
    most = MOST_TOKENS if scale.shape[1] == 1 else MOST_TOKENS_GROUPED
    return 0 < tokens <= most and _library() is not None


def multiply_few(x: Tensor, weight: PreparedWeight, scheme: Scheme) -> Tensor | None:
    """Quantize a few tokens and multiply, without registered operators: fp32 [M, N], or None.

    Args:
        x: [M, K].
        weight: prepared for quantized activations.
        scheme: of the activations.
    """
    if weight.few is None or weight.few_scale is None or not suits(x.shape[0], weight.few_scale):
        return None
    if scheme.range_method != "minmax" or backend_for(x) != "cpu" or not cpu.available(x.dtype):
        return None
    codes, token_scale, _ = cpu.quantize_dynamic(x, x.shape[1], Grid.of(scheme), RangeRule.of(scheme))
    return decode_product(codes, token_scale, weight.few, weight.few_scale)


def decode_product(codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Exact int32 sums of each group, scaled: fp32 [M, N].

    Args:
        codes: int8 [M, K].
        token_scale: fp32 [M, 1].
        weight: int8 [N, K].
        scale: fp32 [N, G].
    """
    library = _library()
    if library is None:
        raise RuntimeError("the compiled path was called where it is not available")
    record("integer")
    (tokens, features), (rows, groups) = codes.shape, scale.shape
    y = torch.empty((tokens, rows), dtype=torch.float32)
    tensors = (codes.contiguous(), token_scale.contiguous(), weight, scale.contiguous(), y)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = [ctypes.c_int64(size) for size in (tokens, rows, features, features // groups)]
    library.qatapult_decode(*pointers, *sizes, torch.get_num_threads())
    return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(Path(__file__).with_name("decode.cpp"))
