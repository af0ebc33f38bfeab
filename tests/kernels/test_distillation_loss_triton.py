"""The Triton kernels of the distillation losses: rows longer than a block, and what they compile to."""

from __future__ import annotations

import pytest
import torch

from qatapult.kernels.common.aot import reports_of
from qatapult.kernels.distillation import rows
from qatapult.kernels.distillation.objective import Kind, Objective

triton_kernel = pytest.importorskip("qatapult.kernels.distillation.triton_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_longer_than_a_block_and_further_apart_than_long(kind: Kind) -> None:
    size = 2 * triton_kernel.BLOCK + 7
    student, teacher = (3 * torch.randn(2, 3, size + 9, device=DEVICE))[..., :size]
    labels = torch.tensor([0, size - 1, triton_kernel.BLOCK], device=DEVICE)
    objective = Objective(kind, 2.0, 0.3, 0.4)
    exact = student.double()
    expected = rows.divergence_rows_(exact, teacher.double(), labels, objective, True)
    actual = triton_kernel.divergence_rows_(student, teacher, labels, objective, True)
    for ours, theirs in zip((*actual, student), (*expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=1e-5)


def test_passes_for_cached_teachers() -> None:
    logits = 3 * torch.randn(3, triton_kernel.BLOCK + 5, device=DEVICE)
    logits[:, 100:400] = float("-inf")
    logits[1, : triton_kernel.BLOCK] = float("-inf")
    exact = logits.double()
    lse = rows.logsumexp_rows(exact, 0.5)
    torch.testing.assert_close(triton_kernel.logsumexp_rows(logits, 0.5).double(), lse, atol=0, rtol=1e-6)
    factor = torch.rand(3, device=DEVICE)
    shifts = lse.float(), rows.logsumexp_rows(logits, 1.0)
    rows.exponential_rows_(exact, factor.double(), shifts[0].double(), 0.5, 0.3, shifts[1].double())
    triton_kernel.exponential_rows_(logits, factor, shifts[0], 0.5, 0.3, shifts[1])
    torch.testing.assert_close(logits.double(), exact, atol=1e-7, rtol=1e-5)


def test_compiled_for_gpus_without_spills_and_with_wide_loads() -> None:
    for report in reports_of("qatapult.kernels.distillation.triton_kernel"):
        assert report.stack_bytes == 0, report.name
        assert report.registers <= 96, (report.name, report.registers)
        assert "LDG.E.128" in report.sass or "LDG.E.EF.128" in report.sass, report.name
