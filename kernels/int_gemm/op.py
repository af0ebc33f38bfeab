"""Registered operators of the integer products, and the functions in front of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from qatapult.kernels.common.launches import record
from qatapult.kernels.fake_quant.direct import dynamic_codes
from qatapult.kernels.fake_quant.dynamic import fuses, quantize_dynamic
from qatapult.kernels.int_gemm import vnni
from qatapult.kernels.int_gemm.cpu import int_matmul_cpu, integer_linear_cpu
from qatapult.kernels.int_gemm.decode import decode_product, multiply_few, suits
from qatapult.kernels.int_gemm.tiles import TileLayout
from qatapult.kernels.int_gemm.weights import Layout, PreparedWeight, check_schemes, prepare_weight
from qatapult.kernels.scheme import Scheme


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of int8 codes, `a · bᵀ`.

    Args:
        a: int8 [M, K].
        b: int8 [N, K].

    Returns:
        int32 [M, N], equal to the integer sum on every device.

    Raises:
        ValueError: for other dtypes or shapes, or K above 131,071, where int32 could overflow.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"int_matmul takes int8 codes, not {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"int_matmul takes [M, K] and [N, K], not {tuple(a.shape)} and {tuple(b.shape)}")
    if a.shape[1] >= 2**17:
        raise ValueError(f"K={a.shape[1]} could overflow int32; at most {2**17 - 1}")
    return _int_matmul(a, b)


@torch.library.custom_op("qatapult::int_matmul", mutates_args=())
def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu":
        return int_matmul_cpu(a, b)
    from qatapult.kernels.int_gemm.cuda import int_matmul_cuda

    return int_matmul_cuda(a, b)


@_int_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


def quantize_activations(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Quantize tokens (rows along the last dimension) to int8 codes.

    Args:
        x: fp32, bf16 or fp16, [..., K].
        scheme: per token and symmetric; its `bits` may be fewer than 8.

    Returns:
        Codes, int8 of the shape of x, and scales, fp32 [..., 1]: `x ≈ codes · scale`. The same bits as
        `choose_range` and `quantize` give.

    Raises:
        ValueError: for a scheme that is not per token and symmetric on the integer grid.
    """
    check_schemes(Scheme(), scheme)
    codes, scale, _ = quantize_dynamic(x.detach(), scheme)
    return codes, scale


def packed_linear(
    x: Tensor,
    weight: Tensor | PreparedWeight,
    weight_scale: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_scheme: Scheme | None = None,
    activation_scheme: Scheme | None = None,
    features: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x · Wᵀ + bias` on packed integer weights: the served arithmetic.

    With an `activation_scheme` x is quantized per token and the product is one of integers (W4A8, W8A8, …);
    without, x stays in floating point (W4A16, …). Inference only: no gradient flows.

    Args:
        x: fp32, bf16 or fp16, [..., K].
        weight: a `PreparedWeight` (what a module should hold), or the output of `pack`, which is then
            prepared at every call and needs the scale, scheme and features beside it.
        weight_scale: fp32, shape `weight_scheme.scale_shape((N, K))`.
        weight_zero_point: as the scale, or None on a symmetric grid.
        bias: [N], any floating dtype.
        weight_scheme: the weight's grid.
        activation_scheme: per token, symmetric; or None.
        features: K.
        out_dtype: of the result; that of x if None.

    Returns:
        [..., N].

    Raises:
        ValueError: if x has not K features, or schemes and tensors do not go together.
    """
    if isinstance(weight, Tensor):
        if weight_scale is None or weight_scheme is None or features is None:
            raise ValueError(
                "packed bits need weight_scale, weight_scheme and features; or pass a PreparedWeight"
            )
        weight = prepare_weight(
            weight,
            weight_scale,
            weight_zero_point,
            scheme=weight_scheme,
            features=features,
            activation_scheme=activation_scheme,
        )
    if x.shape[-1] != weight.features:
        raise ValueError(f"x has {x.shape[-1]} features; the weight has {weight.features}")
    return multiply_prepared(x, weight, bias, activation_scheme, out_dtype or x.dtype)


def multiply_prepared(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    activation_scheme: Scheme | None,
    dtype: torch.dtype,
) -> Tensor:
    """`packed_linear` on a prepared weight."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if activation_scheme is not None and not torch.compiler.is_compiling():
        # At a token a call the dispatch of registered operators takes longer than the product.
        direct = _directly(rows, weight, bias, activation_scheme, dtype)
        if direct is not None:
            return direct.reshape(*x.shape[:-1], weight.out_features)
    if activation_scheme is None:
        if weight.layout not in ("values", "tiles"):
            raise ValueError("this weight was prepared for quantized activations; pass activation_scheme")
        codes, token_scale = rows, None
    else:
        codes, token_scale = quantize_activations(rows, activation_scheme)
    product = _packed_product(
        codes,
        token_scale,
        weight.operand,
        weight.scale,
        weight.shift,
        bias,
        weight.few,
        weight.few_scale,
        weight.layout,
        weight.scheme.storage_bits,
        weight.slice_width or weight.exact_span,
        weight.scheme.level_offset != 0,
        dtype,
    )
    return product.reshape(*x.shape[:-1], weight.out_features)


def _directly(
    rows: Tensor, weight: PreparedWeight, bias: Tensor | None, tokens: Scheme, dtype: torch.dtype
) -> Tensor | None:
    """Quantize and multiply without registered operators in between; None where there is no way for this."""
    if weight.layout == "tiles":
        if not fuses(rows, tokens):
            return None
        return multiply_codes(*dynamic_codes(rows, tokens), weight, bias, dtype)
    if weight.layout == "vnni":
        parts = (weight.operand, weight.scale, weight.shift, bias)
        return vnni.quantized_product(rows, *parts, tokens, dtype)
    product = multiply_few(rows, weight, tokens)
    if product is None:
        return None
    return (product if bias is None else product + bias.float()).to(dtype)


def multiply_codes(
    codes: Tensor, token_scale: Tensor, weight: PreparedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`packed_linear` on codes that exist already, for use inside other operators: [M, K] to [M, N]."""
    operand, scale, shift = weight.operand, weight.scale, weight.shift
    if weight.layout == "tiles":
        from qatapult.kernels.int_gemm.cuda import packed_product_triton

        tiles, half = (
            TileLayout(weight.scheme.storage_bits, weight.slice_width),
            weight.scheme.level_offset != 0,
        )
        record("integer")
        return packed_product_triton(codes, token_scale, operand, scale, shift, bias, tiles, half, dtype)
    record("integer")
    return integer_linear_cpu(
        codes, token_scale, operand, scale, shift, weight.layout, weight.exact_span, bias, dtype
    )


@torch.library.custom_op("qatapult::packed_product", mutates_args=())
def _packed_product(
    codes: Tensor,
    token_scale: Tensor | None,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    few: Tensor | None,
    few_scale: Tensor | None,
    layout: str,
    bits: int,
    width: int,
    half: bool,
    dtype: torch.dtype,
) -> Tensor:
    if layout == "tiles":
        from qatapult.kernels.int_gemm.cuda import packed_product_triton

        tiles = TileLayout(bits, width)
        record("float" if token_scale is None else "integer")
        return packed_product_triton(codes, token_scale, operand, scale, shift, bias, tiles, half, dtype)
    if layout == "vnni":
        assert token_scale is not None
        return vnni.product(codes, token_scale, operand, scale, shift, bias, dtype)
    if token_scale is None:
        record("float")
        product = linear(codes.to(operand.dtype), operand)
    elif few is not None and few_scale is not None and suits(codes.shape[0], few_scale):
        product = decode_product(codes, token_scale, few, few_scale)
    else:
        record("integer")
        cpu_layout = _layout(layout)
        return integer_linear_cpu(codes, token_scale, operand, scale, shift, cpu_layout, width, bias, dtype)
    if bias is not None:
        product = product + bias.float()
    return product.to(dtype)


@_packed_product.register_fake
def _(
    codes: Tensor,
    token_scale: Tensor | None,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    few: Tensor | None,
    few_scale: Tensor | None,
    layout: str,
    bits: int,
    width: int,
    half: bool,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=dtype)


def _layout(name: str) -> Layout:
    if name not in ("int8", "codes", "values"):
        raise ValueError(f"layout={name!r} is none of the CPU's")
    return name  # type: ignore[return-value]
