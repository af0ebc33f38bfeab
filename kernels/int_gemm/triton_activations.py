"""Per-token quantization in one pass: a program reads a token once and keeps it in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatapult.kernels.common.rounding import clamp, round_half_even, round_to_bfloat16


@triton.jit
def quantize_token(  # type: ignore[no-untyped-def]
    x, codes, scale, K, STEPS: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    LARGEST: tl.constexpr, SCALE_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one token.

    Args:
        x: [M, K], any floating dtype.
        codes: int8 [M, K].
        scale: fp32 [M].
        STEPS: scales between zero and the range's end.
        LARGEST: the largest finite number of the scales' dtype.
    """
    i_m = tl.program_id(0)
    o_k = tl.arange(0, BLOCK)
    inside = o_k < K
    value = tl.load(x + i_m.to(tl.int64) * K + o_k, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, 0.0)
    largest = tl.minimum(tl.max(tl.abs(value), 0), 3.4028234663852886e38)
    step = tl.minimum(tl.div_rn(largest, STEPS), LARGEST)
    if SCALE_DTYPE == "bfloat16":
        step = round_to_bfloat16(step)
    elif SCALE_DTYPE == "float16":
        step = step.to(tl.float16).to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    quotient = tl.div_rn(value, tl.full((BLOCK,), 1.0, tl.float32) * step)
    code = round_half_even(clamp(quotient, QMIN, QMAX)).to(tl.int8)
    tl.store(codes + i_m.to(tl.int64) * K + o_k, code, mask=inside)
    tl.store(scale + i_m, step)


def quantize_tokens_triton(
    x: Tensor, steps: float, qmin: int, qmax: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` on a GPU."""
    features = x.shape[-1]
    rows = x.reshape(-1, features).contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    if rows.numel():
        quantize_token[(rows.shape[0],)](
            rows, codes, scale, features, steps, qmin, qmax,
            torch.finfo(dtype).max, str(dtype).removeprefix("torch."), block,
            num_warps=max(1, min(16, block // 1024)),
        )  # fmt: skip
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
