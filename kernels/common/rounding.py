"""Pieces of Triton kernels that are exactly IEEE under the compiler and under the interpreter alike."""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 · 2^23: adding it to a number of magnitude below 2^22 leaves no bits behind the point.
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):  # type: ignore[no-untyped-def]
    """Nearest integer, ties to even, never −0; for `|x| ≤ 2^22` in fp32. NaN stays NaN."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def clamp(x, low, high):  # type: ignore[no-untyped-def]
    """`x` within `[low, high]`; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to_bfloat16(x):  # type: ignore[no-untyped-def]
    """The fp32 value of a finite `x` rounded to bf16, half to even (the interpreter's own cast truncates)."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)
