"""Pieces of Triton kernels that are exactly IEEE under the compiler and under the interpreter alike."""

from __future__ import annotations

import triton
import triton.language as tl

from qatapult.kernels.common.backend import interpreting

#: 1.5 · 2^23: adding it to a number of magnitude below 2^22 leaves no bits behind the point.
_MAGIC = tl.constexpr(12582912.0)
#: Scales beyond these are brought towards 1 by a factor that is a power of two.
_SMALL, _LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
_UP, _DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)
_INTERPRETING = tl.constexpr(interpreting())


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
def divide(x, scale, low, high):  # type: ignore[no-untyped-def]
    """The correctly rounded fp32 quotient `x / scale` within `[low, high]`, of many `x` by few scales.

    Only quotients strictly inside are exact; the others come out as a bound, to one unit in the last place.
    The bounds are magnitudes below 2^20; `x` is `[R, C]`, all else `[R, 1]`; NaN stays NaN.

    A division takes about 15 instructions and a branch. Here the correctly rounded reciprocal is computed
    once a scale, and two residual corrections by fused multiply-add give the correctly rounded quotient
    (Markstein, IBM Journal of Research and Development 34(1), 1990: correct where the quotient before the
    last correction is within one unit in the last place, to which the first brings it). Scales far from 1
    are multiplied with a power of two together with `x`, so that no residual underflows. The interpreter has
    no fused multiply-add: it divides.
    """
    if _INTERPRETING:
        return clamp(tl.div_rn(x, scale), low, high)
    magnitude = tl.abs(scale)
    shift = tl.where(magnitude < _SMALL, _UP, tl.where(magnitude > _LARGE, _DOWN, 1.0))
    scale = scale * shift
    x = clamp(x * shift, tl.minimum(low * scale, high * scale), tl.maximum(low * scale, high * scale))
    reciprocal = tl.div_rn(1.0, scale)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)


@triton.jit
def round_to_bfloat16(x):  # type: ignore[no-untyped-def]
    """The fp32 value of a finite `x` rounded to bf16, half to even (the interpreter's own cast truncates)."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)
