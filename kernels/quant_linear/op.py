"""`quantized_linear`: the forward product of training on integer codes, its backward on fake-quantized
values."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from qatapult.kernels.fake_quant.spec import Gradient
from qatapult.kernels.grid import check_scale
from qatapult.kernels.int_gemm.weights import check_schemes
from qatapult.kernels.quant_linear.compute import Grids, backward, forward
from qatapult.kernels.quant_linear.reference import fake_quantized_linear
from qatapult.kernels.scheme import Scheme

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
    call = _Eager.apply if _eager(x, weight) else _quantized_linear
    y: Tensor = call(
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
    return x.device.type == "cpu" and (torch.compiler.is_compiling() or _eager(x, weight))


def _eager(x: Tensor, weight: Tensor) -> bool:
    """Whether plain tensors of the CPU are computed with at once: then there is nothing to dispatch."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    plain = type(x) in (Tensor, Parameter) and type(weight) in (Tensor, Parameter)
    traced = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return plain and not traced


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
    grids = Grids.of(scale, zero_point, bits, grid, group, activation_bits, activation_scale_dtype)
    return forward(x, weight, scale, zero_point, bias, grids, integer)


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
    """Gradients of x, weight, scale and zero point; one that does not exist is an empty tensor."""
    grids = Grids.of(scale, zero_point, bits, grid, group, activation_bits, activation_scale_dtype)
    rule = cast(Gradient, gradient)
    found = backward(grad, x, weight, scale, zero_point, grids, rule, needs_x, needs_weight)
    none = (x.new_empty(0, dtype=torch.float32) for _ in found)
    a, b, c, d = (empty if one is None else one for one, empty in zip(found, none, strict=True))
    return a, b, c, d


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    x, weight, scale, zero_point, bias, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, scale, zero_point)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, operator: Any = None) -> tuple[Tensor | None, ...]:
    x, weight, scale, zero_point = ctx.saved_tensors
    *numbers, gradient, _ = ctx.numbers
    needs_x, needs_weight, needs_scale, needs_zero, needs_bias = ctx.needs_input_grad[:5]
    if not (needs_scale or needs_zero):
        gradient = "ste"  # the same gradient of the weight, without the sums
    grad_x, grad_weight, grad_scale, grad_zero = (operator or _quantized_linear_backward)(
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


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than a small layer's quantization."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup_context(ctx, inputs)
        *tensors, bits, grid, group, activation_bits, scale_dtype, _, integer = inputs
        grids = Grids.of(tensors[2], tensors[3], bits, grid, group, activation_bits, scale_dtype)
        x, weight, scale, zero_point, bias = tensors
        return forward(x, weight, scale, zero_point, bias, grids, integer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, _gradients)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *numbers: Any
) -> tuple[Tensor, ...]:
    """`_quantized_linear_backward` without its dispatch."""
    bits, grid, group, activation_bits, scale_dtype, *rule = numbers
    grids = Grids.of(scale, zero_point, bits, grid, group, activation_bits, scale_dtype)
    found = backward(grad, x, weight, scale, zero_point, grids, *rule)
    return tuple(x.new_empty(0) if one is None else one for one in found)
