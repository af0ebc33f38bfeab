"""Forward and backward of a quantized linear layer, without autograd and without dispatch."""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from qatapult.kernels.fake_quant.direct import (
    codes_of,
    dynamic_codes,
    dynamic_values,
    gradients_of,
    values_in,
)
from qatapult.kernels.fake_quant.spec import Gradient
from qatapult.kernels.int_gemm.op import multiply_codes
from qatapult.kernels.int_gemm.weights import prepare_unpacked
from qatapult.kernels.scheme import TERNARY, Granularity, ScaleDtype, Scheme
from qatapult.kernels.scheme import Grid as GridKind


class Grids(NamedTuple):
    """The grids of weight and activations; None leaves activations in floating point."""

    weight: Scheme
    tokens: Scheme | None

    @classmethod
    def of(
        cls,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: float,
        grid: str,
        group: int,
        activation_bits: int,
        scale_dtype: str,
    ) -> Grids:
        """From the numbers that an operator's schema can hold; 0 stands for none."""
        granularity: Granularity = "group" if group else "tensor" if scale.ndim == 1 else "channel"
        symmetric = zero_point is None
        return _grids(bits, grid, group, granularity, symmetric, activation_bits, scale_dtype)


@functools.lru_cache
def _grids(
    bits: float,
    grid: str,
    group: int,
    granularity: Granularity,
    symmetric: bool,
    activation_bits: int,
    scale_dtype: str,
) -> Grids:
    weight = Scheme(
        bits=bits if bits == TERNARY else int(bits),
        granularity=granularity,
        group_size=group or None,
        symmetric=symmetric,
        grid=cast(GridKind, grid),
    )
    if not activation_bits:
        return Grids(weight, None)
    stored = cast(ScaleDtype, scale_dtype)
    return Grids(weight, Scheme(bits=activation_bits, granularity="token", scale_dtype=stored))


def forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    grids: Grids,
    integer: bool,
) -> Tensor:
    """`[M, K]` by `[N, K]` to `[M, N]` in the dtype of x, on codes or on fake-quantized values."""
    if integer and grids.tokens is not None:
        zero_point = None if zero_point is None else zero_point.round()
        codes = codes_of(weight, scale, zero_point, grids.weight)
        prepared = prepare_unpacked(codes, scale, zero_point, grids.weight, grids.tokens)
        return multiply_codes(*dynamic_codes(x, grids.tokens), prepared, bias, x.dtype)
    dtype = product_dtype(x)
    values = values_in(weight, scale, zero_point, grids.weight, dtype)
    bias = None if bias is None else bias.to(dtype)
    return linear(_inputs(x, grids.tokens).to(dtype), values, bias).to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grids: Grids,
    gradient: Gradient,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, scale and zero point where they are needed and exist; values are computed again."""
    dtype = product_dtype(grad)
    grad = grad.to(dtype)
    grad_x = None
    if needs_x:
        grad_x = (grad @ values_in(weight, scale, zero_point, grids.weight, dtype)).to(x.dtype)
    if not needs_weight:
        return grad_x, None, None, None
    grad_values = grad.t() @ _inputs(x, grids.tokens).to(dtype)
    return grad_x, *gradients_of(grad_values, weight, scale, zero_point, grids.weight, gradient)


def product_dtype(like: Tensor) -> torch.dtype:
    """Where the processor multiplies bf16 and fp16 by emulation, fp32 is both faster and finer."""
    if like.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return like.dtype


def _inputs(x: Tensor, tokens: Scheme | None) -> Tensor:
    """The activations as their grid represents them."""
    return x if tokens is None else dynamic_values(x, tokens)
