"""The registered operators `qatapult::fake_quantize` and its backward, and the public functions in front of them."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.grid import check_scale
from qatapult.kernels.ranges import choose_range
from qatapult.kernels.scheme import Scheme
from . import reference
from .spec import Gradient, Grid


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
    `l = round(clamp(v − o, qmin − z, qmax − z)) + o`, the result is `l · scale` in the dtype of `x`. An element is
    *inside* while `qmin − z ≤ v ≤ qmax − z` (on a stretched grid: while it lies in the cell of a level,
    `qmin ≤ v ≤ qmax + 1`). For the incoming gradient `g`:

    | gradient of | `gradient="lsq"`                                      | `"pact"`                 | `"ste"`     |
    |-------------|-------------------------------------------------------|--------------------------|-------------|
    | `x`         | `g` inside, 0 outside                                 | the same                 | the same    |
    | scale       | `f · Σ g · (l − v inside, l outside)`; binary `f · Σ g · l` | `Σ g · (0 inside, l outside)` | none |
    | zero point  | `f · Σ (0 inside, −g · scale outside)`                  | as LSQ with `f = 1`        | none        |

    with `f = 1 / √(elements per scale · top level)`. Sources: LSQ (arXiv:1902.08153, section 2), learned zero points
    as in LSQ+ (arXiv:2004.09576, equation 5, written for the integer zero point that is deployed instead of a real
    offset), PACT (arXiv:1805.06085; `scale_from_clip` makes the scale), stretched grid (SEQ, arXiv:2502.02631).

    Only `x`, the scale and the zero point are saved for backward; everything else is recomputed. Sums over a block
    have a fixed order. A NaN stays a NaN, so that a diverged run is seen; ±inf go to the ends of the grid.

    Args:
        x: fp32, bf16 or fp16, any shape.
        scale: `scheme.scale_shape(x.shape)`, positive; fp32 arithmetic whatever its dtype.
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
    grid = Grid.of(scheme)
    elements = x.numel() // max(1, scale.numel())
    factor = 1 / math.sqrt(max(1, elements) * grid.top) if gradient == "lsq" else 1.0
    return _fake_quantize(x, scale, zero_point, *grid, gradient, factor)


def fake_quantize_dynamic(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Fake-quantize with the range of the tensor at hand: activations quantized token by token.

    The same as `fake_quantize(x, *choose_range(x, scheme), scheme=scheme, gradient="ste")`, except that min-max
    ranges pass every gradient: they hold all of the elements, and the largest may only by the rounding of the scale
    lie half a step above the top level.

    Args:
        x: fp32, bf16 or fp16, `[..., K]`.
        scheme: usually `Scheme(bits=8, granularity="token")`.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    scale, zero_point = choose_range(x, scheme)
    return fake_quantize(x, scale, zero_point, scheme=scheme, gradient="ste")


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
    return _implementation(x).forward(x, scale, zero_point, Grid(qmin, qmax, offset))


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
    return _implementation(x).backward(grad, x, scale, zero_point, grid, gradient, factor)


@_fake_quantize.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@_fake_quantize_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = scale.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point, *ctx.numbers = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    grad_x, grad_scale, grad_zero = _fake_quantize_backward(grad, x, scale, zero_point, *ctx.numbers)
    needs_x, needs_scale, needs_zero = ctx.needs_input_grad[:3]
    return (
        grad_x if needs_x else None,
        grad_scale.to(scale.dtype) if needs_scale else None,
        grad_zero.to(zero_point.dtype) if needs_zero else None,
        *(None for _ in ctx.numbers),
    )


_fake_quantize.register_autograd(_backward, setup_context=_setup_context)


def _implementation(x: torch.Tensor) -> Any:
    """The module with `forward` and `backward` for this tensor."""
    backend_for(x)
    return reference
