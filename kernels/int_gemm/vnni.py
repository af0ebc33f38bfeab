"""Products of int8 activations with packed weights by AVX512-VNNI: `vnni.cpp`.

Codes of 4 bits and fewer stay in four bits, those of 8 in eight, in tiles of 16 rows; quantization of the
tokens, product, scales, zero points, bias and rounding to the output's dtype are one call.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qatapult.kernels.common.cpp import load
from qatapult.kernels.common.launches import record
from qatapult.kernels.fake_quant import cpu as quantizer
from qatapult.kernels.fake_quant.spec import Grid, RangeRule
from qatapult.kernels.scheme import Scheme

_ROWS, _STEP = 16, 8
_CODES = -1  # in place of a dtype: the input is quantized already
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def available() -> bool:
    """Whether the processor has AVX512-VNNI and a compiler was found."""
    return torch.cpu._is_vnni_supported() and _library() is not None


def takes(features: int, groups: int) -> bool:
    """Whether groups of columns end where the kernel's blocks do."""
    return groups == 1 or features // groups % _STEP == 0


def to_vnni(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes, int8 [N, K], in the kernel's order: uint8 [tiles, blocks, 64 or 128], padded with zeros."""
    (rows, features), nibbles = codes.shape, scheme.storage_bits <= 4
    tiles = -(-rows // (2 * _ROWS)) * 2
    blocks = -(-features // _STEP)
    out = torch.zeros(tiles, blocks, 64 if nibbles else 128, dtype=torch.uint8)
    library = _library()
    assert library is not None
    codes = codes.contiguous()
    library.qatapult_vnni_pack(
        codes.data_ptr(), out.data_ptr(), rows, features, nibbles, torch.get_num_threads()
    )
    return out


def quantized_product(
    x: Tensor,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    tokens: Scheme,
    dtype: torch.dtype,
) -> Tensor | None:
    """Quantize tokens and multiply: [M, N] in `dtype`; None where the compiled quantizer does not do it.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        operand: of `to_vnni`.
        scale, shift: fp32 [N, G], in memory by group; shifts are integers.
        bias: [N] or None.
        tokens: scheme of the activations, per token and symmetric.
        dtype: of the result.
    """
    if tokens.range_method != "minmax" or not quantizer.available(x.dtype) or dtype not in _DTYPES:
        return None
    rule = RangeRule.of(tokens)
    how = (quantizer.dynamic_address(), *Grid.of(tokens)[:2], rule.steps, quantizer.STORED[rule.scale_dtype])
    return _call(x.contiguous(), _DTYPES[x.dtype], None, how, operand, scale, shift, bias, dtype)


def product(
    codes: Tensor,
    token_scale: Tensor,
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same for tokens that are quantized already: int8 [M, K] and fp32 [M, 1]."""
    fits = dtype if dtype in _DTYPES else torch.float32
    token_scale, nothing = token_scale.contiguous(), (None, 0, 0, 0.0, 0)
    return _call(codes.contiguous(), _CODES, token_scale, nothing, operand, scale, shift, bias, fits).to(
        dtype
    )


def _call(
    x: Tensor,
    x_dtype: int,
    token_scale: Tensor | None,
    how: tuple[int | None, int, int, float, int],
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    library = _library()
    if library is None:
        raise RuntimeError("the compiled path was called where it is not available")
    record("integer")
    (count, features), (rows, groups) = x.shape, scale.shape
    y = torch.empty((count, rows), dtype=dtype)
    bias = None if bias is None else bias.float().contiguous()
    library.qatapult_vnni_linear(
        x.data_ptr(),
        x_dtype,
        None if token_scale is None else token_scale.data_ptr(),
        *how,
        operand.data_ptr(),
        scale.data_ptr(),
        None if shift is None else shift.data_ptr(),
        None if bias is None else bias.data_ptr(),
        count,
        rows,
        features,
        groups,
        operand.shape[-1] == 64,
        y.data_ptr(),
        _DTYPES[dtype],
        torch.get_num_threads(),
    )
    return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("vnni.cpp"))
    if library is None or not library.qatapult_vnni_available():
        return None
    library.qatapult_vnni_pack.argtypes = (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT)
    library.qatapult_vnni_linear.argtypes = (
        *(_POINTER, _INT, _POINTER),  # x
        *(_POINTER, _INT, _INT, _FLOAT, _INT),  # how it is quantized
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # weight and bias
        *(_LONG, _LONG, _LONG, _LONG),  # sizes
        *(_INT, _POINTER, _INT, _INT),  # four bits a code; output
    )
    library.qatapult_vnni_pack.restype = library.qatapult_vnni_linear.restype = None
    return library
