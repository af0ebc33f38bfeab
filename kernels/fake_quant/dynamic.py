"""Quantization with the range of the tensor at hand, range and all in one pass: activations, token by
token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.common.operator import blocks_batch, differentiable
from qatapult.kernels.fake_quant import cpu, reference
from qatapult.kernels.fake_quant.op import fake_quantize, quantize_codes
from qatapult.kernels.fake_quant.spec import Grid, RangeRule
from qatapult.kernels.ranges import choose_range, finite, minmax_of, scale_of_range
from qatapult.kernels.scheme import ScaleDtype, Scheme


def fake_quantize_dynamic(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Fake-quantize with the range of each block of `x`.

    The values of `fake_quantize(x, *choose_range(x, scheme), scheme=scheme)`, in one pass over memory where
    ranges are min-max within rows. The gradient of `x` passes straight through and nothing is saved for
    backward: a min-max range holds all of the elements (the largest may lie half a step above the top level,
    and is not to lose its gradient for that). With other range methods it is masked to the range, as by
    `gradient="ste"`.

    Args:
        x: fp32, bf16 or fp16, `[..., K]`.
        scheme: usually `Scheme(bits=8, granularity="token")`.

    Returns:
        A tensor of the shape and dtype of `x`, contiguous.
    """
    if not fuses(x, scheme):
        return fake_quantize(x, *choose_range(x, scheme), scheme=scheme, gradient="ste")
    numbers = (scheme.block_size(x.shape[-1]), *Grid.of(scheme), *RangeRule.of(scheme))
    result: torch.Tensor = _differentiable(x, *numbers)
    return result


def quantize_dynamic(
    x: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`choose_range` and `quantize` in one pass over memory where ranges are min-max within rows.

    Args:
        x: fp32, bf16 or fp16, `[..., K]`.
        scheme: usually `Scheme(bits=8, granularity="token")`.

    Returns:
        `(codes, scale, zero_point)`: int8 of the shape of `x`, fp32 of `scheme.scale_shape(x.shape)`, and the
        same or None. No gradients.
    """
    if not fuses(x, scheme):
        scale, zero_point = choose_range(x, scheme)
        return quantize_codes(x, scale, zero_point, scheme), scale, zero_point
    numbers = (scheme.block_size(x.shape[-1]), *Grid.of(scheme), *RangeRule.of(scheme))
    codes, scale, zero = _quantize_dynamic(x.detach(), *numbers)
    return codes, scale, None if scheme.symmetric else zero


def fuses(x: torch.Tensor, scheme: Scheme) -> bool:
    """Whether range and codes come from one pass over memory."""
    return scheme.range_method == "minmax" and scheme.granularity != "tensor" and x.numel() > 0


def _implementation(x: torch.Tensor, block: int) -> ModuleType | None:
    """The module of the backend for rows of this length; None for the reference."""
    backend = backend_for(x)
    if backend == "triton":
        from qatapult.kernels.fake_quant import triton_dynamic

        return triton_dynamic if block <= triton_dynamic.LONGEST else None
    return cpu if backend == "cpu" and cpu.available(x.dtype) else None


def _reference_range(
    x: torch.Tensor, block: int, grid: Grid, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor | None]:
    low, high = minmax_of(finite(x.reshape(-1, block)), rule.symmetric)
    return scale_of_range(low, high, grid, rule)


def values_of(x: torch.Tensor, block: int, grid: Grid, rule: RangeRule) -> torch.Tensor:
    """What the operator `fake_quantize_dynamic` computes."""
    implementation = _implementation(x, block)
    if implementation is None:
        return reference.forward(x, *_reference_range(x, block, grid, rule), grid)
    values: torch.Tensor = implementation.dynamic(x, block, grid, rule)
    return values


def codes_of(
    x: torch.Tensor, block: int, grid: Grid, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the operator `quantize_dynamic` computes: codes, scales, zero points or None."""
    implementation = _implementation(x, block)
    if implementation is None:
        scale, zero_point = _reference_range(x, block, grid, rule)
        return reference.quantize(x, scale, zero_point, grid), scale, zero_point
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    found = implementation.quantize_dynamic(x, block, grid, rule)
    return found


@torch.library.custom_op("qatapult::fake_quantize_dynamic", mutates_args=())
def _fake_quantize_dynamic(
    x: torch.Tensor,
    block: int,
    qmin: int,
    qmax: int,
    offset: float,
    steps: float,
    symmetric: bool,
    scale_dtype: str,
) -> torch.Tensor:
    return values_of(x, block, Grid(qmin, qmax, offset), _rule(steps, symmetric, scale_dtype))


@_fake_quantize_dynamic.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return grad, *(None,) * 7


_differentiable = differentiable(_fake_quantize_dynamic, _backward)


@torch.library.custom_op("qatapult::quantize_dynamic", mutates_args=())
def _quantize_dynamic(
    x: torch.Tensor,
    block: int,
    qmin: int,
    qmax: int,
    offset: float,
    steps: float,
    symmetric: bool,
    scale_dtype: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rule = _rule(steps, symmetric, scale_dtype)
    codes, scale, zero_point = codes_of(x, block, Grid(qmin, qmax, offset), rule)
    shape = _scale_shape(x, block)
    # An operator cannot return None: no zero point is an empty tensor.
    zero_point = x.new_empty(0, dtype=torch.float32) if zero_point is None else zero_point.reshape(shape)
    return codes, scale.reshape(shape), zero_point


@_quantize_dynamic.register_fake
def _(
    x: torch.Tensor,
    block: int,
    qmin: int,
    qmax: int,
    offset: float,
    steps: float,
    symmetric: bool,
    scale_dtype: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = x.new_empty(_scale_shape(x, block), dtype=torch.float32)
    zero_point = x.new_empty(0, dtype=torch.float32) if symmetric else torch.empty_like(scale)
    return x.new_empty(x.shape, dtype=torch.int8), scale, zero_point


for _operator in (_fake_quantize_dynamic, _quantize_dynamic):
    blocks_batch(_operator)


def _scale_shape(x: torch.Tensor, block: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // block)


def _rule(steps: float, symmetric: bool, scale_dtype: str) -> RangeRule:
    stored: ScaleDtype = scale_dtype  # type: ignore[assignment]
    return RangeRule(steps, symmetric, stored)
