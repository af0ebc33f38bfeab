"""Calls into `fake_quant.cpp`; the functions and their arguments are those of `reference.py`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from qatapult.kernels.common.cpp import load
from qatapult.kernels.fake_quant.spec import Gradient, Grid, RangeRule

_SOURCE = Path(__file__).with_name("fake_quant.cpp")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Numbers of the dtypes that scales are rounded to.
STORED = {"float32": 0, "bfloat16": 1, "float16": 2}
_Argument = torch.Tensor | float | ctypes.c_int64 | None
_RULES = {"ste": 0, "lsq": 1, "pact": 2}


def available(dtype: torch.dtype) -> bool:
    """Whether the compiled path exists here, for tensors of this dtype."""
    return dtype in _DTYPES and _library() is not None


def forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Values, in another dtype where one is given; see `reference.forward`."""
    wanted = dtype or x.dtype
    values = _forward(x, scale, zero_point, grid, wanted if _goes_with(x, wanted) else x.dtype)
    return values.to(wanted)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """Codes; see `reference.quantize`."""
    return _forward(x, scale, zero_point, grid, torch.int8)


def _forward(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid, dtype: torch.dtype
) -> torch.Tensor:
    x = x.contiguous()
    out, codes = torch.empty_like(x, dtype=dtype), int(dtype == torch.int8)
    dtypes = (_DTYPES[x.dtype], _DTYPES.get(dtype, 0))
    _call("qatapult_forward", *dtypes, x, out, codes, *_blocks(x, scale, zero_point), *grid)
    return out


def _goes_with(x: torch.Tensor, other: torch.dtype) -> bool:
    """Whether the compiled code reads `x` beside a tensor of the other dtype."""
    return other == x.dtype or (x.dtype, other) == (torch.float32, torch.bfloat16)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    grid: Grid,
    gradient: Gradient,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients; see `reference.backward`."""
    x, grad = x.contiguous(), (grad if _goes_with(x, grad.dtype) else grad.to(x.dtype)).contiguous()
    grad_x, grad_scale = torch.empty_like(x), None if gradient == "ste" else _gradient_of(scale)
    grad_zero = None if gradient == "ste" or zero_point is None else _gradient_of(scale)
    tensors = (grad, x, grad_x, grad_scale, grad_zero, *_blocks(x, scale, zero_point))
    dtypes = (_DTYPES[x.dtype], _DTYPES[grad.dtype])
    _call("qatapult_backward", *dtypes, *tensors, *grid, _RULES[gradient], factor)
    return grad_x, grad_scale, grad_zero


def dynamic(x: torch.Tensor, block: int, grid: Grid, rule: RangeRule) -> torch.Tensor:
    """Values under the range of each block; see `reference.dynamic`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _dynamic(x, block, grid, rule, out, None, None, None)
    return out


def quantize_dynamic(
    x: torch.Tensor, block: int, grid: Grid, rule: RangeRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points under the range of each block; see `reference.quantize_dynamic`."""
    x = x.contiguous()
    scale = torch.empty(*x.shape[:-1], x.shape[-1] // block, dtype=torch.float32)
    zero_point = None if rule.symmetric else torch.empty_like(scale)
    codes = torch.empty_like(x, dtype=torch.int8)
    _dynamic(x, block, grid, rule, None, codes, scale, zero_point)
    return codes, scale, zero_point


def _dynamic(x: torch.Tensor, block: int, grid: Grid, rule: RangeRule, *outputs: torch.Tensor | None) -> None:
    numbers = (rule.steps, STORED[rule.scale_dtype], int(rule.symmetric))
    sizes = (ctypes.c_int64(x.numel() // block), ctypes.c_int64(block))
    _call("qatapult_dynamic", _DTYPES[x.dtype], x, *outputs, *sizes, *grid, *numbers)


@functools.cache
def dynamic_address() -> int | None:
    """Where `qatapult_dynamic` lies, for compiled code that quantizes its own input."""
    library = _library()
    return None if library is None else ctypes.cast(library.qatapult_dynamic, ctypes.c_void_p).value


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(_SOURCE)


def _call(name: str, *arguments: _Argument) -> None:
    """Tensors go as pointers, Python's floats as fp32; the number of threads comes last."""
    library = _library()
    if library is None:
        raise RuntimeError("the compiled path was called where it is not available")
    getattr(library, name)(*map(_c_value, arguments), torch.get_num_threads())


def _c_value(value: _Argument) -> object:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else value


def _blocks(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> tuple[_Argument, ...]:
    """Scales, zero points, number of blocks and elements a block, as the C++ functions take them."""
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    sizes = (scale.numel(), x.numel() // max(1, scale.numel()))
    return scale.float().contiguous(), zero_point, *map(ctypes.c_int64, sizes)


def _gradient_of(scale: torch.Tensor) -> torch.Tensor:
    return torch.empty(scale.shape, dtype=torch.float32)
