"""Which of an operation's implementations runs: the Triton kernel, the compiled CPU path or the torch
reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

Backend = Literal["triton", "cpu", "reference"]

_VARIABLE = "QATAPULT_KERNELS_BACKEND"
_forced: list[Backend] = []


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend for operations on this tensor.

    The innermost `use_backend`, else the environment variable `QATAPULT_KERNELS_BACKEND`, else by device:
    Triton on CUDA where it is installed, the compiled path on the CPU, the reference everywhere else. Asking
    for `cpu` gets the reference where no C++ compiler is found; that is decided, and warned about once, by
    `common.cpp`.
    """
    if _forced:
        return _forced[-1]
    wanted = os.environ.get(_VARIABLE)
    if wanted:
        if wanted not in get_args(Backend):
            raise ValueError(f"{_VARIABLE}={wanted!r} is not one of {', '.join(get_args(Backend))}")
        return cast(Backend, wanted)
    if tensor.device.type == "cuda":
        return "triton" if _has_triton() else "reference"
    return "cpu" if tensor.device.type == "cpu" else "reference"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run the operations inside on one backend, for tests and measurements (`triton` on the CPU: interpreter
    only)."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is not one of {', '.join(get_args(Backend))}")
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter (it is asked for by `TRITON_INTERPRET=1` before
    import)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


def triton_input(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and fp32 under the interpreter, whose bf16 conversions truncate and lose subnormals."""
    return (x.float() if interpreting() else x).contiguous()
