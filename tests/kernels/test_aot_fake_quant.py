"""The Triton kernels compile for the A100 and the H100 without one: no spills, and the loads are wide."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from qatapult.kernels.common.aot import AotCase, AotReport, compile_case, reports_of


@pytest.fixture(scope="module", params=["triton_kernel", "triton_dynamic"])
def reports(request: pytest.FixtureRequest) -> list[AotReport]:
    return reports_of(f"qatapult.kernels.fake_quant.{request.param}")


def test_no_configuration_spills(reports: list[AotReport]) -> None:
    assert {report.capability for report in reports} == {80, 90}
    assert not [report.name for report in reports if report.stack_bytes or report.registers > 160]


def test_loads_and_stores_are_16_bytes_wide(reports: list[AotReport]) -> None:
    for report in reports:
        if "576" in report.name:
            continue  # Rows of 576 lie in tiles of 1024, whose threads hold fewer neighbours.
        assert "LDG.E.128" in report.sass, report.name
        assert "STG.E.128" in report.sass or "quantize " in report.name, report.name


def test_codes_do_not_depend_on_contraction(reports: list[AotReport]) -> None:
    """Quotients come from fused multiply-adds that are asked for; the approximate division is nowhere."""
    for report in reports:
        assert "fma.rn.f32" in report.ptx
        assert "div.full.f32" not in report.ptx


def test_refuses_kernels_of_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(AotCase("python", lambda: None, {}), 80)


def test_failures_are_reported() -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        reports_of("qatapult.kernels.no_such_module")
