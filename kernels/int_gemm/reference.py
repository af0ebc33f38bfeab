"""The products as formulas, in plain torch and exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from qatapult.kernels.grid import dequantize, quantize
from qatapult.kernels.packing import unpack
from qatapult.kernels.ranges import choose_range
from qatapult.kernels.scheme import Scheme


def int_matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """`a · bᵀ` of int8 codes in int32: [M, K] and [N, K] give [M, N]."""
    if a.is_cuda:  # CUDA has no int64 product; float64 holds every sum up to 2^53 exactly
        return (a.double() @ b.double().t()).to(torch.int32)
    return (a.to(torch.int64) @ b.to(torch.int64).t()).to(torch.int32)


def quantize_activations_reference(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes (int8, the shape of x) and scales (fp32, [..., 1]) of tokens."""
    scale, _ = choose_range(x, scheme)
    return quantize(x, scale, None, scheme), scale


def packed_linear_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    weight_scheme: Scheme,
    activation_scheme: Scheme | None,
    features: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`dequantize(quantize(x)) · dequantize(W)ᵀ + bias`, summed in float64."""
    weight = dequantize(unpack(packed, weight_scheme, features), scale, zero_point, weight_scheme).double()
    inputs = x.double()
    if activation_scheme is not None:
        codes, token_scale = quantize_activations_reference(x, activation_scheme)
        inputs = codes.double() * token_scale.double()
    product = inputs @ weight.t()
    if bias is not None:
        product = product + bias.double()
    return product.to(out_dtype or x.dtype)
