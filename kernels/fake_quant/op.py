"""The registered operators of fake-quantization with given scales, and the public function in front of
them."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, get_args

import torch

from qatapult.kernels.blocks import check_scale
from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.common.operator import blocks_batch, differentiable
from qatapult.kernels.fake_quant import cpu, reference
from qatapult.kernels.fake_quant.sharding import accept_dtensor
from qatapult.kernels.fake_quant.spec import Gradient, Grid
from qatapult.kernels.scheme import Scheme


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    scheme: Scheme,
    gradient: Gradient = "lsq",
) -> torch.Tensor:
    """`dequantize(quantize(x))` with gradients, in one pass forward and one backward.

    With `v = x / scale`, `z` the zero point rounded to an integer, `o` the level offset of the grid and
    `l = round(clamp(v − o, qmin − z, qmax − z)) + o`, the result is `l · scale` in the dtype of `x`. An
    element is *inside* while `qmin − z ≤ v ≤ qmax − z` (on an even stretched grid, whose levels lie in the
    middle of their cells: `qmin ≤ v ≤ qmax + 1`). For the incoming gradient `g`:

    | gradient of | `gradient="lsq"`                     | `"pact"`                      | `"ste"`      |
    |-------------|--------------------------------------|-------------------------------|--------------|
    | `x`         | `g` inside, 0 outside                | `g` inside, 0 outside         | the same     |
    | scale       | `f · Σ g · (l − v inside, l outside)` | `Σ g · (0 inside, l outside)` | none         |
    | zero point  | `f · Σ (0 inside, −g · scale outside)` | `Σ (0 inside, −g · scale outside)` | none  |

    with `f = 1 / √(elements per scale · top level)`. On the binary grid, whose values are ±scale / 2 whatever
    the magnitude of `x`, LSQ's gradient of the scale is `f · Σ g · l`.

    Sources: LSQ (arXiv:1902.08153, section 2); learned zero points as in LSQ+ (arXiv:2004.09576, section 3.1,
    written for the integer zero point that is deployed instead of a real offset); PACT (arXiv:1805.06085,
    `scale_from_clip` makes the scale of a learned clipping value); the stretched grid is SEQ of ParetoQ
    (arXiv:2502.02631, section 3.2).

    Only `x`, the scale and the zero point are saved for backward; everything else is recomputed. Sums over a
    block have a fixed order. A NaN stays a NaN, so that a diverged run is seen; ±inf go to the ends of the
    grid.

    Args:
        x: fp32, bf16 or fp16, any shape.
        scale: `scheme.scale_shape(x.shape)`, not zero; the arithmetic is fp32 whatever its dtype.
        zero_point: as `scale`; None on a symmetric grid.
        scheme: the grid.
        gradient: the rule for the gradients, see above.

    Returns:
        A tensor of the shape and dtype of `x`, contiguous.

    Raises:
        ValueError: for scales of another shape or an unknown gradient rule.
    """
    check_scale(x, scale, zero_point, scheme)
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient={gradient!r} is not one of {', '.join(get_args(Gradient))}")
    if gradient == "ste":
        scale = scale.detach()
        zero_point = None if zero_point is None else zero_point.detach()
    accept_dtensor(x)
    grid = Grid.of(scheme)
    factor = scale_factor(x, scale, grid, gradient)
    result: torch.Tensor = _differentiable(x, scale, zero_point, *grid, gradient, factor)
    return result


def scale_factor(x: torch.Tensor, scale: torch.Tensor, grid: Grid, gradient: Gradient) -> float:
    """What the gradients of scale and zero point are multiplied with, `f` of `fake_quantize`."""
    elements = x.numel() // max(1, scale.numel())
    return 1 / math.sqrt(max(1, elements) * grid.top) if gradient == "lsq" else 1.0


def quantize_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """What `grid.quantize` calls once it has checked the shapes."""
    accept_dtensor(x)
    zero_point = None if zero_point is None else zero_point.detach()
    return _quantize(x.detach(), scale.detach(), zero_point, *Grid.of(scheme))


def implementation(x: torch.Tensor) -> ModuleType | Any:
    """The module of the backend for this tensor."""
    backend = backend_for(x)
    if backend == "triton":
        from qatapult.kernels.fake_quant import triton_kernel

        return triton_kernel
    return cpu if backend == "cpu" and cpu.available(x.dtype) else reference


@torch.library.custom_op("qatapult::quantize", mutates_args=())
def _quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    offset: float,
) -> torch.Tensor:
    codes: torch.Tensor = implementation(x).quantize(x, scale, zero_point, Grid(qmin, qmax, offset))
    return codes


@_quantize.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("qatapult::fake_quantize", mutates_args=())
def _fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    offset: float,
    gradient: str,
    factor: float,
) -> torch.Tensor:
    values: torch.Tensor = implementation(x).forward(x, scale, zero_point, Grid(qmin, qmax, offset))
    return values


@_fake_quantize.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("qatapult::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    offset: float,
    gradient: str,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = Grid(qmin, qmax, offset)
    grad_x, *sums = implementation(x).backward(grad, x, scale, zero_point, grid, gradient, factor)
    # A gradient that does not exist is an empty tensor: operators cannot return None.
    grad_scale, grad_zero = (_none(x) if part is None else part for part in sums)
    return grad_x, grad_scale, grad_zero


@_fake_quantize_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    offset: float,
    gradient: str,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = (scale, zero_point) if gradient != "ste" else (None, None)
    grad_scale, grad_zero = (
        _none(x) if like is None else x.new_empty(like.shape, dtype=torch.float32) for like in sums
    )
    return x.new_empty(x.shape), grad_scale, grad_zero


def _none(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.float32)


def _second(ctx: Any, *_: torch.Tensor) -> None:
    raise RuntimeError(
        "fake_quantize has no second derivative: the straight-through rules are not functions' slopes"
    )


_gradients = differentiable(_fake_quantize_backward, _second)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point, *ctx.numbers = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    *grid, gradient, factor = ctx.numbers
    needs_x, needs_scale, needs_zero = ctx.needs_input_grad[:3]
    if gradient == "ste" or not (needs_scale or needs_zero):
        # The same gradient of x, without the sums.
        gradient, needs_scale, needs_zero = "ste", False, False
    grad_x, grad_scale, grad_zero = _gradients(grad, x, scale, zero_point, *grid, gradient, factor)
    return (
        grad_x if needs_x else None,
        grad_scale.to(scale.dtype) if needs_scale else None,
        grad_zero.to(zero_point.dtype) if needs_zero else None,
        *(None for _ in ctx.numbers),
    )


_differentiable = differentiable(_fake_quantize, _backward, _setup_context)
for _operator in (_quantize, _fake_quantize, _fake_quantize_backward):
    blocks_batch(_operator)
