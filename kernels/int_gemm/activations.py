"""Per-token quantization of activations: range, quotient, rounding and clamping over one row."""

from __future__ import annotations

import torch
from torch import Tensor

from qatapult.kernels.scheme import Scheme

#: A Triton program holds a whole token; longer ones do not fit its registers.
MAX_FEATURES = 32768


def quantize_tokens(
    x: Tensor, steps: float, qmin: int, qmax: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes (int8, the shape of x) and scales (fp32, [..., 1]) of the last dimension's rows.

    The formula of `choose_range` (min-max, symmetric) and `quantize`, written as one expression for the compiler.

    Args:
        x: fp32, bf16 or fp16, [..., K].
        steps: scales between zero and the range's end, (levels − 1) / 2.
        qmin, qmax: bounds of the codes.
        dtype: in which scales are stored.
    """
    finite = x.float().nan_to_num(nan=0.0)
    scale = finite.abs().amax(-1, keepdim=True) / steps
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (x.float() / scale).nan_to_num(nan=0.0).clamp(qmin, qmax).round()
    return codes.to(torch.int8), scale


def is_plain(scheme: Scheme) -> bool:
    """Whether the fused form computes the scheme; others go through `choose_range` and `quantize`."""
    return (
        scheme.granularity == "token"
        and scheme.symmetric
        and scheme.range_method == "minmax"
        and scheme.grid == "integer"
    )
