"""Per-token quantization in Triton: a row is read once, stays in registers for its range, and is written
once.

A program holds `ROWS` rows (more than one where rows are short, as groups are) of up to `COLS` elements.
Prefixes as in `triton_kernel.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qatapult.kernels.common.aot import AotCase
from qatapult.kernels.common.backend import triton_input
from qatapult.kernels.common.rounding import clamp, divide, round_half_even, round_to_bfloat16
from qatapult.kernels.fake_quant.spec import Grid, RangeRule

#: Elements of a tile of short rows.
TILE = 4096
#: Longest row that one program holds: 64 elements a thread with 16 warps.
LONGEST = 32768
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LARGEST_BF16 = tl.constexpr(torch.finfo(torch.bfloat16).max)
_LARGEST_FP16 = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit
def _stored(scale, STORED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale as the deployment holds it; see `ranges._stored`."""
    if STORED == "bfloat16":
        scale = round_to_bfloat16(tl.minimum(scale, _LARGEST_BF16))
    elif STORED == "float16":
        scale = tl.minimum(scale, _LARGEST_FP16).to(tl.float16).to(tl.float32)
    else:
        scale = tl.minimum(scale, _LARGEST)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def dynamic_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_out,
    p_scale,
    p_zero,
    rows,
    size,
    steps,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`ROWS` whole rows: values in the dtype of `p_out`, or int8 codes with their scales and zero points."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o_col = tl.arange(0, COLS)[None, :]
    in_rows = o_row < rows
    mask = in_rows & (o_col < size)
    o_x = o_row.to(tl.int64) * size + o_col
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    b_finite = clamp(tl.where(b_x == b_x, b_x, 0.0), -_LARGEST, _LARGEST)
    if SYMMETRIC:
        b_scale = _stored(tl.div_rn(tl.max(tl.abs(b_finite), axis=1, keep_dims=True), steps), STORED)
        b_zero = tl.zeros((ROWS, 1), tl.float32)
    else:
        b_low = tl.minimum(tl.min(b_finite, axis=1, keep_dims=True), 0.0)
        b_high = tl.maximum(tl.max(b_finite, axis=1, keep_dims=True), 0.0)
        b_scale = _stored(tl.div_rn(b_high - b_low, steps), STORED)
        b_zero = round_half_even(clamp(QMIN - tl.div_rn(b_low, b_scale), QMIN, QMAX))
    if CODES:
        b_x = tl.where(b_x == b_x, b_x, 0.0)
    low, high = QMIN - b_zero, QMAX - b_zero
    b_level = round_half_even(divide(b_x, b_scale, low + OFFSET, high + OFFSET) - OFFSET)
    if CODES:
        tl.store(p_out + o_x, (b_level + b_zero).to(tl.int8), mask=mask)
        tl.store(p_scale + o_row, b_scale, mask=in_rows)
        if not SYMMETRIC:
            tl.store(p_zero + o_row, b_zero, mask=in_rows)
    else:
        tl.store(p_out + o_x, ((b_level + OFFSET) * b_scale).to(p_out.dtype.element_ty), mask=mask)


@cache
def tile_of(size: int) -> tuple[int, int, int]:
    """`(ROWS, COLS, warps)` for rows of `size` elements."""
    cols = triton.next_power_of_2(max(1, size))
    return max(1, TILE // cols), cols, 16 if cols > 8192 else 8


def dynamic(x: torch.Tensor, block: int, grid: Grid, rule: RangeRule) -> torch.Tensor:
    """Values under the range of each block of `block` neighbours."""
    out = torch.empty_like(triton_input(x))
    _launch(x, out, None, None, block, grid, rule)
    return out.to(x.dtype)


def quantize_dynamic(
    x: torch.Tensor, block: int, grid: Grid, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points, `[blocks]`, under the range of each block of `block` neighbours."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.numel() // block, device=x.device)
    zero_point = None if rule.symmetric else torch.empty_like(scale)
    _launch(x, codes, scale, zero_point, block, grid, rule)
    return codes, scale, zero_point


def _launch(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    block: int,
    grid: Grid,
    rule: RangeRule,
) -> None:
    blocks = x.numel() // block
    rows, cols, warps = tile_of(block)
    numbers = (*grid, rule.symmetric, rule.scale_dtype, out.dtype == torch.int8, rows, cols)
    with torch.cuda.device_of(x):
        dynamic_kernel[(-(-blocks // rows),)](  # Triton's own division takes microseconds on the host
            triton_input(x), out, scale, zero_point, blocks, block, rule.steps, *numbers, num_warps=warps
        )


def aot_cases() -> list[AotCase]:
    """Each shape class that is launched; see `common.aot`."""
    cases = []
    for size, dtype, symmetric, codes in (
        (576, "bf16", True, True),
        (4096, "bf16", True, False),
        (4096, "bf16", True, True),
        (4096, "bf16", False, True),
        (11008, "bf16", True, False),
        (32768, "bf16", True, True),
        (128, "fp16", True, False),
    ):
        rows, cols, warps = tile_of(size)
        constants: dict[str, Any] = {"QMIN": -128, "QMAX": 127, "OFFSET": 0.0, "SYMMETRIC": symmetric}
        constants |= {"STORED": "float32", "CODES": codes, "ROWS": rows, "COLS": cols}
        signature = {"p_x": f"*{dtype}", "p_out": "*i8" if codes else f"*{dtype}"}
        for name, present in (("p_scale", codes), ("p_zero", codes and not symmetric)):
            if present:
                signature[name] = "*fp32"
            else:
                constants[name] = None
        aligned = (*signature, "rows", "size")
        signature |= {"rows": "i32", "size": "i32", "steps": "fp32"}
        kind = f"{'quantize' if codes else 'fake-quantize'} {size}{'' if symmetric else ' asymmetric'}"
        name = f"dynamic {kind} {dtype}"
        cases.append(AotCase(name, dynamic_kernel, signature, constants, warps, aligned=aligned))
    return cases
