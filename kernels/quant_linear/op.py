"""`quantized_linear`: the forward product of training on integer codes, its backward on fake-quantized
values."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from qatapult.kernels.fake_quant.dynamic import fake_quantize_dynamic
from qatapult.kernels.fake_quant.op import values_in
from qatapult.kernels.fake_quant.spec import Gradient, Grid
from qatapult.kernels.grid import check_scale, quantize
from qatapult.kernels.int_gemm.op import multiply_prepared
from qatapult.kernels.int_gemm.weights import check_schemes, prepare_unpacked
from qatapult.kernels.quant_linear.reference import fake_quantized_linear
from qatapult.kernels.scheme import TERNARY, Granularity, ScaleDtype, Scheme
from qatapult.kernels.scheme import Grid as GridKind

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
    minmax = activation_scheme is None or activation_scheme.range_method == "minmax"
    integer = integer and activation_scheme is not None and minmax
    if not integer and not (minmax and _fuses(x, weight)):
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
        0 if activation_scheme is None else int(activation_scheme.bits),
        "float32" if activation_scheme is None else activation_scheme.scale_dtype,
        gradient,
        integer,
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


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the fake-quantized forward goes through the operator, which keeps nothing but its inputs.

    On the CPU, where quantizing the weight again in the backward pass costs little beside the products. Sharded
    tensors and the transforms of `torch.func` need the composition of differentiable parts.
    """
    plain = type(x) in (Tensor, Parameter) and type(weight) in (Tensor, Parameter)
    compiling = torch.compiler.is_compiling()
    return x.device.type == "cpu" and (
        compiling or (plain and not torch._C._are_functorch_transforms_active())
    )


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
    integer: bool,
) -> Tensor:
    scheme = _weight_scheme(scale, zero_point, bits, grid, group)
    tokens = _token_scheme(activation_bits, activation_scale_dtype)
    if integer and tokens is not None:
        zero_point = None if zero_point is None else zero_point.round()
        codes = quantize(weight, scale, zero_point, scheme)
        prepared = prepare_unpacked(codes, scale, zero_point, scheme, tokens)
        return multiply_prepared(x, prepared, bias, tokens, x.dtype)
    dtype = product_dtype(x)
    values = values_in(weight, scale, zero_point, scheme, dtype)
    bias = None if bias is None else bias.to(dtype)
    return linear(_inputs(x, tokens).to(dtype), values, bias).to(x.dtype)


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("qatapult::quantized_linear_backward", mutates_args=())
def _quantized_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: float,
    grid: str,
    group: int,
    activation_bits: int,
    activation_scale_dtype: str,
    gradient: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale and zero point; one that is not needed or does not exist is empty."""
    scheme = _weight_scheme(scale, zero_point, bits, grid, group)
    dtype = product_dtype(grad)
    grad = grad.to(dtype)
    grad_x, grad_weight, grad_scale, grad_zero = (x.new_empty(0, dtype=torch.float32) for _ in range(4))
    if needs_x:
        grad_x = (grad @ values_in(weight, scale, zero_point, scheme, dtype)).to(x.dtype)
    if needs_weight:
        inputs = _inputs(x, _token_scheme(activation_bits, activation_scale_dtype)).to(dtype)
        top = Grid.of(scheme).top
        factor = 1 / math.sqrt(weight.numel() // scale.numel() * top) if gradient == "lsq" else 1.0
        grad_weight, grad_scale, grad_zero = torch.ops.qatapult.fake_quantize_backward(
            grad.t() @ inputs, weight, scale, zero_point, *Grid.of(scheme), gradient, factor
        )
    return grad_x, grad_weight, grad_scale, grad_zero


@_quantized_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *numbers: Any
) -> Any:
    gradient, needs_x, needs_weight = numbers[-3:]
    learned = needs_weight and gradient != "ste"
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0, dtype=torch.float32),
        torch.empty_like(weight) if needs_weight else x.new_empty(0, dtype=torch.float32),
        x.new_empty(scale.shape if learned else 0, dtype=torch.float32),
        x.new_empty(scale.shape if learned and zero_point is not None else 0, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, bias, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, scale, zero_point)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, zero_point = ctx.saved_tensors
    *numbers, gradient, _ = ctx.numbers
    needs_x, needs_weight, needs_scale, needs_zero, needs_bias = ctx.needs_input_grad[:5]
    if not (needs_scale or needs_zero):
        gradient = "ste"  # the same gradient of the weight, without the sums
    grad_x, grad_weight, grad_scale, grad_zero = torch.ops.qatapult.quantized_linear_backward(
        grad.contiguous(), x, weight, scale, zero_point, *numbers, gradient,
        needs_x, needs_weight or needs_scale or needs_zero,
    )  # fmt: skip
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_scale.to(scale.dtype) if needs_scale and grad_scale.numel() else None,
        grad_zero.to(zero_point.dtype) if needs_zero and grad_zero.numel() else None,
        grad.float().sum(0).to(ctx.bias_dtype) if needs_bias else None,
        *(None for _ in ctx.numbers),
    )


_quantized_linear.register_autograd(_backward, setup_context=_setup_context)


def _inputs(x: Tensor, tokens: Scheme | None) -> Tensor:
    """The activations as their grid represents them."""
    return x if tokens is None else fake_quantize_dynamic(x.detach(), tokens)


def product_dtype(like: Tensor) -> torch.dtype:
    """Where the processor multiplies bf16 and fp16 by emulation, fp32 is both faster and finer."""
    if like.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return like.dtype


def _weight_scheme(scale: Tensor, zero_point: Tensor | None, bits: float, grid: str, group: int) -> Scheme:
    granularity: Granularity = "group" if group else "tensor" if scale.ndim == 1 else "channel"
    return Scheme(
        bits=bits if bits == TERNARY else int(bits),
        granularity=granularity,
        group_size=group or None,
        symmetric=zero_point is None,
        grid=cast(GridKind, grid),
    )


def _token_scheme(bits: int, scale_dtype: str) -> Scheme | None:
    """The activations' grid; 0 bits stand for none."""
    return (
        None
        if not bits
        else Scheme(bits=bits, granularity="token", scale_dtype=cast(ScaleDtype, scale_dtype))
    )
