"""Calls into `rows.cpp`; the functions and their arguments are those of `rows.py`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qatapult.kernels.common.cpp import load
from qatapult.kernels.distillation.objective import Objective

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def available(dtype: torch.dtype) -> bool:
    """Whether the compiled path exists here, for logits of this dtype."""
    return dtype in _DTYPES and _library() is not None


def divergence_rows_(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """See `rows.divergence_rows_`."""
    given = student
    if teacher.dtype != student.dtype:  # heads of different dtypes
        student, teacher = student.float(), teacher.float()
    kl = torch.empty(len(student))
    cross_entropy = torch.zeros(len(student))
    _call(
        "qatapult_divergence",
        *(_DTYPES[student.dtype], _KINDS[objective.kind], student, teacher, labels, kl, cross_entropy),
        *(*_sizes(student), objective.temperature, objective.beta, objective.ce_weight, int(want_grad)),
    )
    if want_grad and student is not given:
        given.copy_(student)
    return kl, cross_entropy


def logsumexp_rows(logits: Tensor, inverse: float) -> Tensor:
    """See `rows.logsumexp_rows`."""
    result = torch.empty(len(logits))
    _call("qatapult_logsumexp", _DTYPES[logits.dtype], logits, result, *_sizes(logits), inverse)
    return result


def exponential_rows_(
    logits: Tensor, factor: Tensor, shift: Tensor, inverse: float, hard_factor: float, hard_shift: Tensor
) -> None:
    """See `rows.exponential_rows_`."""
    columns = (factor.contiguous(), shift.contiguous(), hard_shift.contiguous())
    numbers = (*_sizes(logits), inverse, hard_factor)
    _call("qatapult_exponentials", _DTYPES[logits.dtype], logits, *columns, *numbers)


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(Path(__file__).with_name("rows.cpp"))


def _sizes(logits: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(logits.shape[0]), ctypes.c_int64(logits.shape[1])


def _call(name: str, *arguments: Tensor | float | ctypes.c_int64 | None) -> None:
    """Tensors go as pointers, Python's floats as fp32; the number of threads comes last."""
    library = _library()
    if library is None:
        raise RuntimeError("the compiled path was called where it is not available")
    getattr(library, name)(*map(_c_value, arguments), torch.get_num_threads())


def _c_value(value: Tensor | float | ctypes.c_int64 | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else value
