"""Integer products on the CPU, by what the processor can do.

With VNNI, `torch._int_mm` multiplies int8 codes. Without it that call is a naive loop (20 × slower than an
fp32 GEMM on an AVX2 machine), so codes are multiplied as fp32 numbers instead, which is bit-exact while no
sum can reach 2^24: K is cut into spans that guarantee it, and spans are added in int32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .weights import EXACT_FLOAT32, MAX_ACTIVATION, Layout


def int_matmul_cpu(a: Tensor, b: Tensor) -> Tensor:
    """`a · bᵀ` in int32, exact; see `int_matmul`."""
    if not a.numel() or not b.numel():
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
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


def integer_linear_cpu(
    codes: Tensor,
    token_scale: Tensor,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    layout: Layout,
    span: int,
) -> Tensor:
    """Product of quantized activations with a prepared weight, in fp32 and without bias.

    Args:
        codes: activation codes, int8 [M, K].
        token_scale: fp32 [M, 1].
        operand, scale, shift, layout, span: of the `PreparedWeight`.
    """
    if layout == "values":
        return linear(codes.float(), operand) * token_scale
    if layout == "codes":
        accumulator = exact_float_product(codes.float(), operand, span)
        return scale_product(accumulator, token_scale, scale[:, 0])
    if operand.shape[0] == 1 and shift is None:
        return scale_product(torch._int_mm(codes, operand[0].t()), token_scale, scale[:, 0])
    total = torch.zeros((codes.shape[0], operand.shape[1]))
    for group, part in enumerate(codes.split(operand.shape[2], dim=1)):
        accumulator = torch._int_mm(part.contiguous(), operand[group].t()).float()
        if shift is not None:
            row_sum = part.sum(1, keepdim=True, dtype=torch.int32).float()
            accumulator = accumulator - row_sum * shift[:, group]
        total += accumulator * scale[:, group]
    return total * token_scale


def scale_product(accumulator: Tensor, token_scale: Tensor, scale: Tensor) -> Tensor:
    """The epilogue: `accumulator[m, n] · scale[n] · token_scale[m]` in fp32, in the order of the compiled paths."""
    return accumulator.float() * scale * token_scale
