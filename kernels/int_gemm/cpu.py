"""Integer products on the CPU, by what the processor can do.

With VNNI, `torch._int_mm` multiplies int8 codes. Without it that call is a naive loop (20 × slower than an
fp32 GEMM on an AVX2 machine), so codes are multiplied as fp32 numbers instead, which is bit-exact while no
sum can reach 2^24: K is cut into spans that guarantee it, and spans are added in int32.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from qatapult.kernels.common.cpp import load
from qatapult.kernels.int_gemm.weights import EXACT_FLOAT32, MAX_ACTIVATION, Layout


def int_matmul_cpu(a: Tensor, b: Tensor) -> Tensor:
    """`a · bᵀ` in int32, exact; see `int_matmul`."""
    if not a.numel() or not b.numel():
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    if a.shape[1] == 1:  # torch 2.13's `_int_mm` returns memory that it did not write
        return a.int() * b.int().t()
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(a.contiguous(), b.contiguous().t())
    span = (EXACT_FLOAT32 - 1) // MAX_ACTIVATION**2
    return exact_float_product(a.float(), b.float(), span).to(torch.int32)


def exact_float_product(a: Tensor, b: Tensor, span: int) -> Tensor:
    """`a · bᵀ` of codes held as fp32: fp32 in one span, int32 from the sum of several."""
    features = a.shape[1]
    if span >= features:
        return linear(a, b)
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for start in range(0, features, span):
        part = slice(start, start + span)
        total += linear(a[:, part], b[:, part]).to(torch.int32)
    return total


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def integer_linear_cpu(
    codes: Tensor,
    token_scale: Tensor,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    layout: Layout,
    span: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Product of quantized activations with a prepared weight, computed in fp32.

    Args:
        codes: activation codes, int8 [M, K].
        token_scale: fp32 [M, 1].
        operand, scale, shift, layout, span: of the `PreparedWeight`.
        bias: [N] or None.
        dtype: of the result.
    """
    if layout == "int8" and operand.shape[0] == 1 and shift is None:
        sums = int_matmul_cpu(codes, operand[0])
        return scaled_sums(sums, token_scale, scale[:, 0], bias, dtype)
    product = _float_product(codes, token_scale, operand, scale, shift, layout, span)
    return (product if bias is None else product + bias.float()).to(dtype)


def _float_product(
    codes: Tensor,
    token_scale: Tensor,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    layout: Layout,
    span: int,
) -> Tensor:
    if layout == "values":
        return linear(codes.float(), operand) * token_scale
    if layout == "codes":
        accumulator = exact_float_product(codes.float(), operand, span)
        return scale_product(accumulator, token_scale, scale[:, 0])
    total = torch.zeros((codes.shape[0], operand.shape[1]))
    for group, part in enumerate(codes.split(operand.shape[2], dim=1)):
        accumulator = int_matmul_cpu(part, operand[group]).float()
        if shift is not None:
            row_sum = part.sum(1, keepdim=True, dtype=torch.int32).float()
            accumulator = accumulator - row_sum * shift[:, group]
        total += accumulator * scale[:, group]
    return total * token_scale


def scaled_sums(
    sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scale_product` of int32 sums, with bias and in its last dtype, in one pass where C++ compiles."""
    library = _library()
    if library is None or dtype not in _DTYPES:
        product = scale_product(sums, token_scale, scale)
        return (product if bias is None else product + bias.float()).to(dtype)
    out = torch.empty(sums.shape, dtype=dtype)
    tensors = (sums, token_scale, scale, None if bias is None else bias.float(), out)
    held = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in held]
    sizes = map(ctypes.c_int64, sums.shape)
    library.qatapult_scaled(_DTYPES[dtype], *pointers, *sizes, torch.get_num_threads())
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(Path(__file__).with_name("epilogue.cpp"))


def scale_product(accumulator: Tensor, token_scale: Tensor, scale: Tensor) -> Tensor:
    """The epilogue: `accumulator[m, n] · scale[n] · token_scale[m]` in fp32, in the order of the compiled paths."""
    return accumulator.float() * scale * token_scale
