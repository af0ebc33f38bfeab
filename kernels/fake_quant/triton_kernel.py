"""Fake-quantization with given scales in Triton: `[blocks, size]` tiles, one read and one write of each
element.

A tile holds `ROWS` blocks (scales) by `COLS` elements. Short blocks (groups) share a program; a long block is
walked in steps of `COLS` by one program, which therefore owns the sum over it: no atomics, a fixed order.
Where there are too few blocks to fill a GPU (one scale a tensor), each is split among programs and the
partial sums are added in a second step.

Prefixes: `p_` pointer, `i_` index of the program, `o_` offsets, `b_` tile in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qatapult.kernels.common.aot import AotCase
from qatapult.kernels.common.backend import triton_input
from qatapult.kernels.common.rounding import clamp, divide, round_half_even
from qatapult.kernels.fake_quant.spec import Gradient, Grid

#: Elements of a tile: with 8 warps, 16 a thread, which are two 16-byte loads of bf16 in flight.
TILE = 4096
NUM_WARPS = 8
#: Programs that fill a GPU: with fewer, blocks are split. A constant, so that sums do not depend on the GPU.
PROGRAMS = 1024


@triton.jit
def _bounds(p_zero, o_row, in_rows, QMIN: tl.constexpr, QMAX: tl.constexpr, HAS_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lowest and highest level of each block, `[ROWS, 1]`."""
    low = tl.full(o_row.shape, QMIN, tl.float32)
    high = tl.full(o_row.shape, QMAX, tl.float32)
    if HAS_ZERO:
        zero = round_half_even(tl.load(p_zero + o_row, mask=in_rows, other=0.0).to(tl.float32))
        low -= zero
        high -= zero
    return low, high


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_scale,
    p_zero,
    p_out,
    blocks,
    size,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile: values (in the dtype of `p_out`), or int8 codes, of `x`."""
    # One dimension of programs: the others end at 65535, which a vocabulary of rows exceeds.
    tiles = tl.cdiv(size, COLS)
    o_row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)[:, None]
    o_col = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)[None, :]
    in_rows = o_row < blocks
    mask = in_rows & (o_col < size)
    o_x = o_row.to(tl.int64) * size + o_col
    b_scale = tl.load(p_scale + o_row, mask=in_rows, other=1.0).to(tl.float32)
    low, high = _bounds(p_zero, o_row, in_rows, QMIN, QMAX, HAS_ZERO)
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    if CODES:
        b_x = tl.where(b_x == b_x, b_x, 0.0)
    b_level = round_half_even(divide(b_x, b_scale, low + OFFSET, high + OFFSET) - OFFSET)
    if CODES:
        tl.store(p_out + o_x, (b_level + (QMIN - low)).to(tl.int8), mask=mask)
    else:
        tl.store(p_out + o_x, ((b_level + OFFSET) * b_scale).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    p_grad,
    p_x,
    p_scale,
    p_zero,
    p_grad_x,
    p_grad_scale,
    p_grad_zero,
    blocks,
    size,
    per_program,
    factor,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`per_program` elements of `ROWS` blocks: gradient of `x`, and this part's sums for scale and zero
    point."""
    i_split = tl.program_id(1)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = o_row < blocks
    b_scale = tl.load(p_scale + o_row, mask=in_rows, other=1.0).to(tl.float32)
    low, high = _bounds(p_zero, o_row, in_rows, QMIN, QMAX, HAS_ZERO)
    b_grad_scale = tl.zeros((ROWS, COLS), tl.float32)
    b_grad_zero = tl.zeros((ROWS, COLS), tl.float32)
    start = i_split * per_program
    for begin in range(start, tl.minimum(start + per_program, size), COLS):
        o_col = begin + tl.arange(0, COLS)[None, :]
        mask = in_rows & (o_col < size)
        o_x = o_row.to(tl.int64) * size + o_col
        b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_x, mask=mask, other=0.0).to(tl.float32)
        b_quotient = divide(b_x, b_scale, low - 1, high + 2)
        inside = (b_quotient >= low) & (b_quotient <= high + 2 * OFFSET)
        tl.store(p_grad_x + o_x, tl.where(inside, b_grad, 0.0).to(p_grad_x.dtype.element_ty), mask=mask)
        if RULE != "ste":
            b_level = round_half_even(clamp(b_quotient - OFFSET, low, high)) + OFFSET
            if RULE == "pact":
                b_slope = tl.where(inside, 0.0, b_level)
            elif QMAX - QMIN == 1:
                b_slope = b_level
            else:
                b_slope = tl.where(inside, b_level - b_quotient, b_level)
            b_grad_scale += b_grad * b_slope
            if HAS_ZERO:
                b_grad_zero -= tl.where(inside, 0.0, b_grad)
    if RULE != "ste":
        o_sum = o_row * tl.num_programs(1) + i_split
        b_sum = tl.sum(b_grad_scale, axis=1, keep_dims=True)
        tl.store(p_grad_scale + o_sum, b_sum * factor, mask=in_rows)
        if HAS_ZERO:
            b_sum = tl.sum(b_grad_zero, axis=1, keep_dims=True)
            tl.store(p_grad_zero + o_sum, b_sum * b_scale * factor, mask=in_rows)


def tile_of(size: int) -> tuple[int, int]:
    """`(ROWS, COLS)` of the tiles for blocks of `size` elements."""
    cols = min(triton.next_power_of_2(max(1, size)), TILE)
    if size > TILE:
        # Half tiles leave less of the last one empty (11008 = 5.4 · 2048 = 2.7 · 4096).
        cols = TILE // 2 if size % TILE else TILE
    return max(1, TILE // cols), cols


def forward(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid, codes: bool = False
) -> torch.Tensor:
    """Launch `forward_kernel`; the arguments are those of `reference.forward`."""
    dtype, x, scale = x.dtype, triton_input(x), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    out = torch.empty_like(x, dtype=torch.int8 if codes else x.dtype)
    if x.numel():
        blocks, size = scale.numel(), x.numel() // scale.numel()
        rows, cols = tile_of(size)
        numbers = (*grid, zero_point is not None, codes, rows, cols)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(size, cols) * triton.cdiv(blocks, rows),)](
                x, scale, zero_point, out, blocks, size, *numbers, num_warps=NUM_WARPS
            )
    return out if codes else out.to(dtype)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """int8 codes; the arguments are those of `reference.quantize`."""
    return forward(x, scale, zero_point, grid, codes=True)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid,
    gradient: Gradient,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch `backward_kernel`; the arguments are those of `reference.backward`."""
    dtype, grad, x, scale = x.dtype, triton_input(grad), triton_input(x), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    grad_x = torch.empty_like(x)
    blocks = scale.numel()
    size = x.numel() // max(1, blocks)
    rows, cols = tile_of(size)
    programs = triton.cdiv(blocks, rows)
    per_program = _up(triton.cdiv(size, max(1, PROGRAMS // max(1, programs))), cols)
    splits = max(1, triton.cdiv(size, per_program))
    # An operator's outputs must not share storage.
    parts = [(torch.empty if x.numel() else torch.zeros)(blocks, splits, device=x.device) for _ in range(2)]
    if x.numel():
        numbers = (*grid, zero_point is not None, gradient, rows, cols)
        with torch.cuda.device_of(x):
            backward_kernel[(programs, splits)](
                grad, x, scale, zero_point, grad_x, *parts, blocks, size, per_program, factor, *numbers,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    grad_scale, grad_zero = ((part.sum(1) if splits > 1 else part).reshape(scale.shape) for part in parts)
    return (
        grad_x.to(dtype),
        None if gradient == "ste" else grad_scale,
        None if gradient == "ste" or zero_point is None else grad_zero,
    )


def aot_cases() -> list[AotCase]:
    """Each shape class that is launched: long and odd channels, groups, one scale a tensor; see
    `common.aot`."""
    cases = []
    for name, size, dtype, zero in (
        ("channel 4096 bf16", 4096, "bf16", False),
        ("channel 11008 bf16", 11008, "bf16", False),
        ("channel 4096 fp32", 4096, "fp32", False),
        ("g128 asymmetric bf16", 128, "bf16", True),
        ("g32 fp16", 32, "fp16", False),
    ):
        rows, cols = tile_of(size)
        grid: dict[str, Any] = {"QMIN": -8, "QMAX": 7, "OFFSET": 0.0, "HAS_ZERO": zero}
        grid |= {"ROWS": rows, "COLS": cols}
        tensors = {"p_x": f"*{dtype}", "p_scale": "*fp32"} | ({"p_zero": "*fp32"} if zero else {})
        none: dict[str, Any] = {} if zero else {"p_zero": None}
        sizes = {"blocks": "i32", "size": "i32"}
        for codes in (False, True) if name == "channel 4096 bf16" else (False,):
            signature = tensors | {"p_out": "*i8" if codes else f"*{dtype}"} | sizes
            label = f"{'quantize' if codes else 'forward'} {name}"
            aligned = (*(name for name, kind in signature.items() if kind[0] == "*"), "blocks", "size")
            constants = grid | none | {"CODES": codes}
            cases.append(AotCase(label, forward_kernel, signature, constants, NUM_WARPS, aligned=aligned))
        signature = {"p_grad": f"*{dtype}"} | tensors | {"p_grad_x": f"*{dtype}"}
        signature |= {"p_grad_scale": "*fp32", "p_grad_zero": "*fp32"} | sizes
        aligned = (
            *(name for name, kind in signature.items() if kind[0] == "*"),
            "blocks",
            "size",
            "per_program",
        )
        signature |= {"per_program": "i32", "factor": "fp32"}
        constants = grid | none | {"RULE": "lsq"}
        cases.append(
            AotCase(f"backward {name}", backward_kernel, signature, constants, NUM_WARPS, aligned=aligned)
        )
    return cases


def _up(number: int, multiple: int) -> int:
    return max(1, triton.cdiv(number, multiple)) * multiple
