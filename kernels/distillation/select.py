"""Which implementation of the passes over rows runs."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.distillation import cpu, rows
from qatapult.kernels.distillation.objective import Objective


class RowKernels(Protocol):
    """The functions that `rows.py`, `cpu.py` and `triton_kernel.py` share; `rows.py` describes them."""

    def divergence_rows_(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        objective: Objective,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def logsumexp_rows(self, logits: Tensor, inverse: float) -> Tensor: ...

    def exponential_rows_(
        self,
        logits: Tensor,
        factor: Tensor,
        shift: Tensor,
        inverse: float,
        hard_factor: float,
        hard_shift: Tensor,
    ) -> None: ...


def row_kernels(logits: Tensor) -> RowKernels:
    """By device; float64 always runs in plain torch."""
    backend = backend_for(logits)
    if backend == "triton" and logits.dtype.itemsize <= 4:
        # Looked for when needed: importing the losses must not need Triton.
        return cast(RowKernels, import_module(f"{__package__}.triton_kernel"))
    if backend == "cpu" and logits.device.type == "cpu" and cpu.available(logits.dtype):
        return cast(RowKernels, cpu)
    return cast(RowKernels, rows)
