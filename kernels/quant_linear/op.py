"""`quantized_linear`: the forward product of training on integer codes, its backward on fake-quantized
values."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from qatapult.kernels.fake_quant.op import fake_quantize
from qatapult.kernels.fake_quant.spec import Gradient, Grid
from qatapult.kernels.grid import check_scale, dequantize, quantize
from qatapult.kernels.int_gemm.op import multiply_prepared, quantize_activations
from qatapult.kernels.int_gemm.weights import check_schemes, prepare_unpacked
from qatapult.kernels.scheme import TERNARY, Granularity, ScaleDtype, Scheme
from qatapult.kernels.scheme import Grid as GridKind

from .reference import fake_quantized_linear

Mode = Literal["auto", "integer", "fake"]


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_scheme: Scheme,
    activation_scheme: Scheme | None,
    gradient: Gradient = "lsq",
    mode: Mode = "auto",
) -> Tensor:
    """A linear layer under quantization-aware training whose forward is the deployed integer product.

    Forward: `s_x · s_w · (codes(x) · codes(W)ᵀ) + bias`, the sum in exact integers: the arithmetic of
        `packed_linear`, so the trained layer and the packed one agree to the last rounding. Backward: that
        of `fake_quantize_dynamic(x) · fake_quantize(W)ᵀ`, with `gradient`'s rule for weight, scale and zero
        point and the straight-through gradient for x. Only x, the weight and its scales are saved; codes
        are computed again.

    Args:
        x: fp32, bf16 or fp16, [..., K].
        weight: [N, K], any floating dtype.
        weight_scale: fp32, `weight_scheme.scale_shape((N, K))`.
        weight_zero_point: as the scale; None on a symmetric grid. Rounded to integers before use.
        bias: [N] or None.
        weight_scheme: grid of the weight.
        activation_scheme: per token, symmetric; None leaves activations in floating point.
        gradient: see `fake_quantize`.
        mode: `integer` multiplies codes, `fake` fake-quantized values; `auto` takes what is faster on the
            device (`prefers_integer`). Activations whose range is not min-max always take `fake`.

    Returns:
        [..., N] in the dtype of x, or in autocast's where that is on.

    Raises:
        ValueError: if schemes and shapes do not go together.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is not one of {', '.join(get_args(Mode))}")
    check_schemes(weight_scheme, activation_scheme)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features; the weight has {weight.shape[1]}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    integer = mode == "integer" or (mode == "auto" and prefers_integer(x, weight_scheme))
    if activation_scheme is None or not integer or activation_scheme.range_method != "minmax":
        return fake_quantized_linear(
            x,
            weight,
            weight_scale,
            weight_zero_point,
            bias,
            weight_scheme=weight_scheme,
            activation_scheme=activation_scheme,
            gradient=gradient,
        )
    check_scale(weight, weight_scale, weight_zero_point, weight_scheme)
    if gradient == "ste":
        weight_scale = weight_scale.detach()
        weight_zero_point = None if weight_zero_point is None else weight_zero_point.detach()
    y = _quantized_linear(
        x.reshape(-1, x.shape[-1]),
        weight,
        weight_scale,
        weight_zero_point,
        bias,
        weight_scheme.bits,
        weight_scheme.grid,
        weight_scheme.group_size or 0,
        int(activation_scheme.bits),
        activation_scheme.scale_dtype,
        gradient,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def prefers_integer(x: Tensor, weight_scheme: Scheme) -> bool:
    """Whether the integer forward is the faster one for this input.

    On CPUs with VNNI per channel (int8 has twice the rate of bf16); on CPUs without bf16 instructions for
    bf16 inputs (exact fp32 products of codes against emulated bf16). Not on a GPU: quantizing for the backward
    pass once more costs more than int8 products save (docs/performance/h100.md: 1.13 against 1.04 of plain).
    """
    per_channel = weight_scheme.granularity != "group"
    if x.device.type != "cpu":
        return False
    if torch.cpu._is_vnni_supported():
        return per_channel
    return x.dtype != torch.float32


@torch.library.custom_op("qatapult::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: float,
    grid: str,
    group: int,
    activation_bits: int,
    activation_scale_dtype: str,
    gradient: str,
) -> Tensor:
    scheme = _weight_scheme(scale, zero_point, bits, grid, group)
    tokens = _token_scheme(activation_bits, activation_scale_dtype)
    zero_point = None if zero_point is None else zero_point.round()
    codes = quantize(weight, scale, zero_point, scheme)
    return multiply_prepared(
        x, prepare_unpacked(codes, scale, zero_point, scheme, tokens), bias, tokens, x.dtype
    )


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, bias, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, scale, zero_point)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, zero_point = ctx.saved_tensors
    bits, grid_name, group, activation_bits, activation_scale_dtype, gradient = ctx.numbers
    needs_x, needs_weight, needs_scale, needs_zero, needs_bias = ctx.needs_input_grad[:5]
    scheme = _weight_scheme(scale, zero_point, bits, grid_name, group)
    dtype = product_dtype(grad)
    grad_x = grad_weight = grad_scale = grad_zero = grad_bias = None
    if needs_x:
        values = fake_quantize(weight, scale, zero_point, scheme=scheme, gradient="ste")
        grad_x = (grad.to(dtype) @ values.to(dtype)).to(x.dtype)
    if needs_weight or needs_scale or needs_zero:
        tokens = _token_scheme(activation_bits, activation_scale_dtype)
        codes, token_scale = quantize_activations(x, tokens)
        inputs = dequantize(codes, token_scale, None, tokens, dtype)
        grad_values = grad.to(dtype).t() @ inputs
        grad_weight, grad_scale, grad_zero = fake_quantize_backward(
            grad_values, weight, scale, zero_point, scheme, gradient
        )
    if needs_bias:
        grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
    return (
        grad_x,
        grad_weight if needs_weight else None,
        grad_scale if needs_scale else None,
        grad_zero if needs_zero else None,
        grad_bias,
        *(None for _ in ctx.numbers),
    )


_quantized_linear.register_autograd(_backward, setup_context=_setup_context)


def product_dtype(like: Tensor) -> torch.dtype:
    """Where the processor multiplies bf16 and fp16 by emulation, fp32 is both faster and finer."""
    if like.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return like.dtype


def fake_quantize_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, gradient: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of weight, scale and zero point from that of the fake-quantized weight; see
    `fake_quantize`."""
    grid = Grid.of(scheme)
    factor = 1 / math.sqrt(weight.numel() // scale.numel() * grid.top) if gradient == "lsq" else 1.0
    grad_weight, grad_scale, grad_zero = torch.ops.qatapult.fake_quantize_backward(
        grad, weight, scale, zero_point, *grid, gradient, factor
    )
    return (
        grad_weight,
        grad_scale.to(scale.dtype) if grad_scale.numel() else None,
        grad_zero.to(zero_point.dtype) if zero_point is not None and grad_zero.numel() else None,
    )


def _weight_scheme(scale: Tensor, zero_point: Tensor | None, bits: float, grid: str, group: int) -> Scheme:
    granularity: Granularity = "group" if group else "tensor" if scale.ndim == 1 else "channel"
    return Scheme(
        bits=bits if bits == TERNARY else int(bits),
        granularity=granularity,
        group_size=group or None,
        symmetric=zero_point is None,
        grid=cast(GridKind, grid),
    )


def _token_scheme(bits: int, scale_dtype: str) -> Scheme:
    return Scheme(bits=bits, granularity="token", scale_dtype=cast(ScaleDtype, scale_dtype))
