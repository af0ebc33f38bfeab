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


class Weight(ctypes.Structure):
    """A weight as `vnni.cpp` sees it; whoever makes one keeps the tensors that it points to."""

    _fields_ = (
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("shift", _POINTER),
        ("bias", _POINTER),
        ("rows", _LONG),
        ("features", _LONG),
        ("groups", _LONG),
        ("quantizer", _POINTER),
        ("nibbles", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("qmax", ctypes.c_int32),
        ("stored", ctypes.c_int32),
        ("steps", _FLOAT),
    )


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
    if not quantizes(tokens, x.dtype) or dtype not in _DTYPES:
        return None
    weight, _held = native(operand, scale, shift, bias, x.shape[1], tokens)
    return _call(x.contiguous(), _DTYPES[x.dtype], None, weight, dtype)


def quantizes(tokens: Scheme, dtype: torch.dtype) -> bool:
    """Whether the compiled quantizer does tokens of this scheme and dtype."""
    return tokens.range_method == "minmax" and quantizer.available(dtype)


def native(
    operand: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    features: int,
    tokens: Scheme | None,
) -> tuple[Weight, Tensor | None]:
    """The structure of a weight, and the bias that it points to; arguments are those of `quantized_product`."""
    bias = None if bias is None else bias.float().contiguous()
    how: tuple[int | None, int, int, int, int, float] = (None, int(operand.shape[-1] == 64), 0, 0, 0, 0.0)
    if tokens is not None:
        rule, (qmin, qmax) = RangeRule.of(tokens), Grid.of(tokens)[:2]
        stored = quantizer.STORED[rule.scale_dtype]
        how = (quantizer.dynamic_address(), how[1], qmin, qmax, stored, rule.steps)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (operand, scale, shift, bias)]
    return Weight(*pointers, scale.shape[0], features, scale.shape[1], *how), bias


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
    weight, _held = native(operand, scale, shift, bias, codes.shape[1], None)
    return _call(codes.contiguous(), _CODES, token_scale.contiguous(), weight, fits).to(dtype)


def _call(x: Tensor, x_dtype: int, token_scale: Tensor | None, weight: Weight, dtype: torch.dtype) -> Tensor:
    library = _library()
    if library is None:
        raise RuntimeError("the compiled path was called where it is not available")
    record("integer")
    y = torch.empty((x.shape[0], weight.rows), dtype=dtype)
    library.qatapult_vnni_linear(
        ctypes.byref(weight),
        x.data_ptr(),
        x_dtype,
        None if token_scale is None else token_scale.data_ptr(),
        x.shape[0],
        y.data_ptr(),
        _DTYPES[dtype],
        torch.get_num_threads(),
    )
    return y


def linear_address() -> int | None:
    """Where `qatapult_vnni_linear` lies, for compiled code that multiplies inside of a larger call."""
    library = _library()
    return None if library is None else ctypes.cast(library.qatapult_vnni_linear, _POINTER).value


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("vnni.cpp"))
    if library is None or not library.qatapult_vnni_available():
        return None
    library.qatapult_vnni_pack.argtypes = (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT)
    library.qatapult_vnni_linear.argtypes = (_POINTER, _POINTER, _INT, _POINTER, _LONG, _POINTER, _INT, _INT)
    library.qatapult_vnni_pack.restype = library.qatapult_vnni_linear.restype = None
    return library
