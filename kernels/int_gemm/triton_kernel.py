"""Products of packed weights with activations, on tensor cores.

One kernel computes `Yᵀ = W · Xᵀ` for all bits (8, 4, 3, 2, 1), for int8 activations (`INTEGER`: int8 × int8 →
int32) and floating-point ones (codes become fp16 or bf16 in registers, exactly), for scales per channel and
per group, for prefill (`SPLIT = 1`) and decode (`SPLIT > 1`: K is divided among programs). The weight is
the left operand because that is the one that Hopper's `wgmma` takes from registers, where slices are
unpacked (`tiles.py`).

Split sums go to a workspace, and the program that arrives last adds them in the order of the splits:
deterministic, and exact for int32.

Symbols: N output channels, M tokens, K features; a unit holds SLICES slices of WIDTH codes. Prefixes: `o_`
offsets, `p_` pointers, `i_` indices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qatapult.kernels.common.backend import interpreting

#: The interpreter runs no inline assembly.
_ASM = tl.constexpr(not interpreting())


@triton.constexpr_function
def align_asm(bits, s, half):  # type: ignore[no-untyped-def]
    """PTX that moves slice `s` of a plane to the top of its bytes and sets the half; four bytes at once."""
    shift = 8 - bits * (s + 1)
    mask, set_bits = ((256 - (256 >> bits)) * 0x01010101, ((128 >> bits) if half else 0) * 0x01010101)
    return f"{{ .reg .b32 t; shl.b32 t, $1, {shift}; lop3.b32 $0, t, {mask}, {set_bits}, 0xEA; }}"


@triton.constexpr_function
def align3_asm(s):  # type: ignore[no-untyped-def]
    """The same for three bits: two from the plane of high bits, one from that of low bits."""
    high, low = 6 - 2 * (s % 4), 5 - s
    move = f"shl.b32 l, $2, {low};" if low >= 0 else f"shr.u32 l, $2, {-low};"
    return (
        f"{{ .reg .b32 h, l; shl.b32 h, $1, {high}; {move} "
        f"and.b32 h, h, {0xC0C0C0C0}; lop3.b32 $0, l, {0x20202020}, h, 0xEA; }}"
    )


@triton.constexpr_function
def _float_asm(width, is_bfloat16):  # type: ignore[no-untyped-def]
    """PTX that turns the top `width` bits of four signed bytes into four fp16 or bf16 integers.

    The biased bits become the low mantissa of 1024 (fp16) or 128 (bf16), from which that number and the
    bias are then subtracted, two at a time.
    """
    center, one, kind = (0x4300, 0x3F80, "bf16x2") if is_bfloat16 else (0x6400, 0x3C00, "f16x2")
    sign = 1 << (width - 1)
    less = (0x8000 | center | sign) * 0x10001
    return (
        f"{{ .reg .b32 t, a, b, one, less; shr.u32 t, $2, {8 - width}; "
        f"lop3.b32 t, t, {((1 << width) - 1) * 0x01010101}, {sign * 0x01010101}, 0x6A; "
        f"prmt.b32 a, t, {(center >> 8) * 0x01010101}, 0x4140; "
        f"prmt.b32 b, t, {(center >> 8) * 0x01010101}, 0x4342; "
        f"mov.b32 one, {one * 0x10001}; mov.b32 less, {less}; "
        f"fma.rn.{kind} $0, a, one, less; fma.rn.{kind} $1, b, one, less; }}"
    )


@triton.jit
def _float_codes(codes, like, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The top WIDTH bits of aligned codes as numbers of the dtype that `like` points to, exactly."""
    dtype = like.dtype.element_ty
    fused: tl.constexpr = _ASM and (dtype == tl.float16 or (dtype == tl.bfloat16 and WIDTH < 8))
    if fused:
        asm: tl.constexpr = _float_asm(WIDTH, dtype == tl.bfloat16)
        out = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [codes], dtype=like.dtype.element_ty, is_pure=True, pack=4
        )
    else:
        out = (codes >> (8 - WIDTH)).to(dtype)
    return out


@triton.jit
def _slice(plane, low_plane, S: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of slice S as int8, 2^(8 − BITS) times too large; HALF adds the stretched grid's half."""
    if BITS == 8:
        out = plane
    elif BITS == 3:
        if _ASM:
            asm3: tl.constexpr = align3_asm(S)
            out = tl.inline_asm_elementwise(
                asm3, "=r,r,r", [plane, low_plane], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            high = (plane.to(tl.int32) & 0xFF) << (6 - 2 * (S % 4))
            low = (low_plane.to(tl.int32) & 0xFF) << 5 >> S
            out = ((high & 0xC0) | (low & 0x20)).to(tl.int8)
    else:
        if _ASM:
            asm: tl.constexpr = align_asm(BITS, S, HALF)
            out = tl.inline_asm_elementwise(asm, "=r,r", [plane], dtype=tl.int8, is_pure=True, pack=4)
        else:
            wide = (plane.to(tl.int32) & 0xFF) << (8 - BITS * (S + 1))
            out = ((wide & (256 - (256 >> BITS))) | ((128 >> BITS) * HALF)).to(tl.int8)
    return out


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    total, y, token_scale, scale, shift, row_sum, bias, o_n, o_m, M, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAW: tl.constexpr, EXCESS: tl.constexpr,
):  # fmt: skip
    """Scales, zero points, bias and store of a block [N, M] of sums."""
    in_n, in_m = o_n < N, o_m < M
    p_y = y + o_m[None, :].to(tl.int64) * N + o_n[:, None]
    inside = in_n[:, None] & in_m[None, :]
    if RAW:
        tl.store(p_y, total >> (8 - BITS), mask=inside)
    else:
        value = total.to(tl.float32)
        if GROUP == 0 and INTEGER and HAS_SHIFT:
            zero = tl.load(shift + o_n, mask=in_n, other=0.0) / EXCESS
            sums = tl.load(row_sum + o_m, mask=in_m, other=0).to(tl.float32)
            value -= sums[None, :] * zero[:, None]
        if INTEGER:
            value *= tl.load(token_scale + o_m, mask=in_m, other=0.0)[None, :]
        if GROUP == 0:
            value *= (tl.load(scale + o_n, mask=in_n, other=0.0) * EXCESS)[:, None]
        if HAS_BIAS:
            value += tl.load(bias + o_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        tl.store(p_y, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _whole_units(  # type: ignore[no-untyped-def]
    total, x, p_w, scale, o_n, o_m, start, end, M, N, K, rows,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, EVEN_K: tl.constexpr,
    EXCESS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of units of 4-bit codes whose two slices go into one product, which is waited for once.

    Groups are a unit or several, so that one scale serves a unit; that of the next is loaded a unit ahead.
    """
    o_k = tl.arange(0, 2 * WIDTH)
    p_x = x + tl.where(o_m < M, o_m, 0).to(tl.int64)[None, :] * K + o_k[:, None]
    if GROUP != 0:
        next_scale = tl.load(scale + start * (2 * WIDTH) // GROUP * N + o_n, mask=o_n < N, other=0.0)
    for u in range(start, end):
        plane = tl.load(p_w + u * (rows.to(tl.int64) * WIDTH))
        low, high = _slice(plane, plane, 0, BITS, HALF), _slice(plane, plane, 1, BITS, HALF)
        left = tl.join(low, high).permute(0, 2, 1).reshape(BLOCK_N, 2 * WIDTH)
        if EVEN_K:
            right = tl.load(p_x + u * (2 * WIDTH))
        else:
            right = tl.load(p_x + u * (2 * WIDTH), mask=(u * (2 * WIDTH) + o_k < K)[:, None], other=0)
        if GROUP == 0:
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        else:
            unit_scale = next_scale
            k_next = (u + 1) * (2 * WIDTH)
            in_n = (o_n < N) & (k_next + 0 * o_n < K)
            next_scale = tl.load(scale + k_next // GROUP * N + o_n, mask=in_n, other=0.0)
            sums = tl.dot(left, right, out_dtype=tl.int32)
            total += sums.to(tl.float32) * (unit_scale * EXCESS)[:, None]
    return total


# Nothing is gained by knowing the divisors of these, and M varies from call to call: one binary serves all.
@triton.jit(do_not_specialize=["M", "units"])
def packed_gemm(  # type: ignore[no-untyped-def]
    x, w, y, token_scale, scale, shift, row_sum, bias, partial, counter,
    M, N, K, rows, units,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, INTEGER: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, RAW: tl.constexpr, EVEN_K: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, RASTER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of `Yᵀ = W · Xᵀ` over one split of K.

    Args:
        x: codes int8, or fp16 / bf16 activations: [M, K].
        w: int8 view of the tiles, [units, planes, rows, WIDTH].
        y: [M, N], the output; int32 if RAW (the accumulators, no scales).
        token_scale: fp32 [M].
        scale, shift: fp32 [G, N]; shift is the zero point.
        row_sum: int32, sums of a token's codes over each stretch of SPAN slices, [stretches, M]; over K
            without groups.
        bias: [N].
        partial: workspace, [blocks, SPLIT, BLOCK_M, BLOCK_N], int32 or fp32.
        counter: int32 [blocks], zero before and after.
        GROUP: codes that share a scale, 0 for one scale a channel.
        SPAN: slices that surely lie within one group, after which its scale is applied.
        WHOLE: both slices of a unit are multiplied at once (`_whole_units`).
        RASTER: blocks of channels that neighbouring programs share before they go on to other tokens.
    """
    SLICES: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    UNIT: tl.constexpr = SLICES * WIDTH
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    # What a sum must be multiplied with: int8 codes lie at the top of their bytes, halves count double.
    EXCESS: tl.constexpr = 1.0 / (1 << (8 - BITS)) if INTEGER else 1.0 / (1 << HALF)
    i_block, i_split = tl.program_id(0), tl.program_id(1)
    blocks_n, blocks_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = i_block // (RASTER * blocks_m) * RASTER
    width = min(blocks_n - first, RASTER)
    i_n = first + i_block % (RASTER * blocks_m) % width
    i_m = i_block % (RASTER * blocks_m) // width

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, WIDTH)
    p_x = x + tl.where(o_m < M, o_m, 0).to(tl.int64)[None, :] * K + o_k[:, None]
    p_w = w + o_n[:, None] * WIDTH + o_k[None, :]

    split = tl.cdiv(units, SPLIT)
    start = i_split * split
    if GROUP == 0 and INTEGER:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = min(start + split, units)
    if WHOLE:
        total = _whole_units(
            total, x, p_w, scale, o_n, o_m, start, end, M, N, K, rows,
            BITS, WIDTH, GROUP, HALF, EVEN_K, EXCESS, BLOCK_N,
        )  # fmt: skip
    else:
        for u in range(start, end):
            p_plane = p_w + u * (rows.to(tl.int64) * (PLANES * WIDTH))
            plane = tl.load(p_plane)
            if BITS == 3:
                plane_high = tl.load(p_plane + rows * WIDTH)
                plane_low = tl.load(p_plane + 2 * rows * WIDTH)
            for s in tl.static_range(SLICES):
                if BITS == 3:
                    codes = _slice(plane if s < 4 else plane_high, plane_low, s, BITS, HALF)
                else:
                    codes = _slice(plane, plane, s, BITS, HALF)
                k = u * UNIT + s * WIDTH
                if EVEN_K:
                    right = tl.load(p_x + k)
                else:
                    right = tl.load(p_x + k, mask=(k + o_k < K)[:, None], other=0)
                # Of a unit that ends beyond K, the slices there have no group.
                in_n = o_n < N if EVEN_K else (o_n < N) & (k + 0 * o_n < K)
                if INTEGER:
                    left = codes
                else:
                    left = _float_codes(codes, x, BITS + HALF)
                    if HAS_SHIFT:
                        p_shift = shift + (k // GROUP * N if GROUP else 0) + o_n
                        zero = tl.load(p_shift, mask=in_n, other=0.0)
                        left = (left - zero[:, None]).to(x.dtype.element_ty)
                if GROUP == 0:
                    total = tl.dot(left, right, total, out_dtype=total.dtype, input_precision="ieee")
                else:
                    if s % SPAN == 0:
                        if INTEGER:
                            sums = tl.dot(left, right, out_dtype=tl.int32)
                        else:
                            sums = tl.dot(left, right, out_dtype=tl.float32, input_precision="ieee")
                    else:
                        sums = tl.dot(left, right, sums, out_dtype=sums.dtype, input_precision="ieee")
                    if s % SPAN == SPAN - 1:
                        i_group = k // GROUP
                        group_scale = tl.load(scale + i_group * N + o_n, mask=in_n, other=0.0)
                        part = sums.to(tl.float32)
                        if INTEGER and HAS_SHIFT:
                            zero = tl.load(shift + i_group * N + o_n, mask=in_n, other=0.0) / EXCESS
                            p_sum = row_sum + k // (SPAN * WIDTH) * M + o_m
                            in_m = o_m < M if EVEN_K else (o_m < M) & (k + 0 * o_m < K)
                            part -= zero[:, None] * tl.load(p_sum, mask=in_m, other=0).to(tl.float32)[None, :]
                        total += part * (group_scale * EXCESS)[:, None]

    if SPLIT == 1:
        _finish(
            total, y, token_scale, scale, shift, row_sum, bias, o_n, o_m, M, N,
            BITS, GROUP, INTEGER, HAS_SHIFT, HAS_BIAS, RAW, EXCESS,
        )  # fmt: skip
    else:
        o_part = o_m[None, :] % BLOCK_M * BLOCK_N + o_n[:, None] % BLOCK_N
        p_part = partial + i_block * SPLIT * BLOCK_M * BLOCK_N + o_part
        in_m = (o_m < M)[None, :]
        tl.store(p_part + i_split * BLOCK_M * BLOCK_N, total, mask=in_m)
        # All threads' stores come before the count, and the last program's loads after it.
        tl.debug_barrier()
        if tl.atomic_add(counter + i_block, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.load(p_part, mask=in_m, other=0, cache_modifier=".cg")
            # Small blocks are all loaded at once; large ones would not fit the registers.
            if BLOCK_M <= 32:
                for i in tl.static_range(1, SPLIT):
                    total += tl.load(p_part + i * BLOCK_M * BLOCK_N, mask=in_m, other=0, cache_modifier=".cg")
            else:
                for i in tl.range(1, SPLIT, num_stages=1):
                    total += tl.load(p_part + i * BLOCK_M * BLOCK_N, mask=in_m, other=0, cache_modifier=".cg")
            tl.store(counter + i_block, 0)
            _finish(
                total, y, token_scale, scale, shift, row_sum, bias, o_n, o_m, M, N,
                BITS, GROUP, INTEGER, HAS_SHIFT, HAS_BIAS, RAW, EXCESS,
            )  # fmt: skip
