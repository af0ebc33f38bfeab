"""The product of packed weights with one token, without tensor cores.

With a single token a product is a matter of reading the weight once, and of the time until the first bytes
arrive and after the last ones did. So a program takes a few rows over the whole of K, loads them straight into
registers, all at once where K allows, and sums with `dp4a` (four int8 products and their sum): no shared
memory, no split of K between programs, no second pass. Sums of codes are int32 and exact; groups are scaled in
fp32 and added in a fixed order.

Blocks are `[UNITS, ROWS, WORDS]`: units along K, rows, and 32-bit words of four codes of a slice. Prefixes as in
`triton_kernel.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qatapult.kernels.int_gemm.triton_kernel import _ASM, align3_asm, align_asm


@triton.jit
def _slice_words(word, low_word, S: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four codes of slice S in each word, at the top of their bytes; as `triton_kernel._slice`."""
    if BITS == 8:
        out = word
    elif BITS == 3:
        if _ASM:
            asm3: tl.constexpr = align3_asm(S)
            out = tl.inline_asm_elementwise(
                asm3, "=r,r,r", [word, low_word], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            high = word << (6 - 2 * (S % 4))
            low = low_word << (5 - S) if S <= 5 else low_word >> (S - 5)
            out = (high & -0x3F3F3F40) | (low & 0x20202020)
    else:
        if _ASM:
            asm: tl.constexpr = align_asm(BITS, S, HALF)
            out = tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        else:
            mask: tl.constexpr = (256 - (256 >> BITS)) * 0x01010101
            out = ((word.to(tl.int64) << (8 - BITS * (S + 1))) & mask).to(tl.int32)
            out = out | ((128 >> BITS) * HALF * 0x01010101)
    return out


@triton.jit
def _dot4(a, b, total):  # type: ignore[no-untyped-def]
    """`total` plus the products of the four signed bytes of two words."""
    if _ASM:
        out = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        out = total
        for byte in tl.static_range(4):
            out += (a << (24 - 8 * byte) >> 24) * (b << (24 - 8 * byte) >> 24)
    return out


@triton.jit(do_not_specialize=["units"])
def packed_gemv(  # type: ignore[no-untyped-def]
    x, w, y, token_scale, scale, bias, N, rows, units,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAW: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """ROWS elements of `W · x`.

    Args:
        x: int8 codes as int32 words, [K / 4].
        w: int32 view of the tiles, [units, planes, rows, WIDTH / 4].
        y: [N]; int32 if RAW.
        token_scale: fp32 [1].
        scale: fp32 [G, N].
        bias: [N].
        UNITS: units that are loaded together.
        Others: as in `packed_gemm`.
    """
    SLICES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    WORDS: tl.constexpr = WIDTH // 4
    EXCESS: tl.constexpr = 1.0 / (1 << (8 - BITS))
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_word = tl.arange(0, WORDS)
    o_row = o_n * WORDS
    # What the end needs is asked for at the start, where nothing waits for it.
    if not RAW:
        row_scale = tl.load(token_scale) * EXCESS
        if GROUP == 0:
            row_scale = row_scale * tl.load(scale + o_n, mask=o_n < N, other=0.0)
    if HAS_BIAS:
        row_bias = tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if GROUP == 0:
        total = tl.zeros((UNITS, ROWS, WORDS), tl.int32)
    else:
        total = tl.zeros((UNITS, ROWS), tl.float32)
    for first in range(0, units, UNITS):
        o_u = first + tl.arange(0, UNITS)
        inside = o_u < units
        p_w = w + (o_u.to(tl.int64) * (rows * PLANES * WORDS))[:, None, None]
        p_w += o_row[None, :, None] + o_word[None, None, :]
        word = tl.load(p_w, mask=inside[:, None, None], other=0, eviction_policy="evict_first")
        if BITS == 3:
            word_high = tl.load(p_w + rows * WORDS, mask=inside[:, None, None], other=0)
            word_low = tl.load(p_w + 2 * rows * WORDS, mask=inside[:, None, None], other=0)
        for s in tl.static_range(SLICES):
            o_x = (o_u * SLICES + s)[:, None, None] * WORDS + o_word[None, None, :]
            right = tl.load(x + o_x, mask=inside[:, None, None], other=0)
            if BITS == 3:
                left = _slice_words(word if s < 4 else word_high, word_low, s, BITS, HALF)
            else:
                left = _slice_words(word, word, s, BITS, HALF)
            left, right = tl.broadcast(left, right)
            if GROUP == 0:
                total = _dot4(left, right, total)
            else:
                if s % SPAN == 0:
                    sums = tl.zeros((UNITS, ROWS, WORDS), tl.int32)
                sums = _dot4(left, right, sums)
                if s % SPAN == SPAN - 1:
                    i_group = (o_u * SLICES + s) * WIDTH // GROUP
                    in_scale = inside[:, None] & (o_n < N)[None, :]
                    p_scale = scale + i_group[:, None] * N + o_n[None, :]
                    group_scale = tl.load(p_scale, mask=in_scale, other=0.0)
                    total += tl.sum(sums, axis=2).to(tl.float32) * group_scale
    in_n = o_n < N
    if GROUP == 0:
        row = tl.sum(tl.sum(total, axis=2), axis=0)
    else:
        row = tl.sum(total, axis=0)
    if RAW:
        tl.store(y + o_n, row >> (8 - BITS), mask=in_n)
    else:
        value = row.to(tl.float32) * row_scale
        if HAS_BIAS:
            value += row_bias
        tl.store(y + o_n, value.to(y.dtype.element_ty), mask=in_n)
