"""`qatapult advise`: the decision matrix, the 7B example, break-even and its sensitivity."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.plan.advice import Situation, advise, economics_of, situation_of
from qatapult.trainer.plan.evidence import Evidence, expect, measured, published
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.matrix import SCENARIOS, cell, rows
from qatapult.trainer.plan.measure_ptq import ptq_loss_of
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.report.text import dollars


def situation(**changes: object) -> Situation:
    """The brief's 7B example: 8 × A100-80GB for 4 days, $100,000 a year of serving, half of it saved."""
    fields = {
        "scenario": "cloud",
        "weight_bits": 4,
        "activation_bits": 8,
        "tolerance": 0.02,
        "ptq_loss": 0.06,
        "training_cost": 2500.0,
        "training_days": 4.0,
        "serving_cost": 100_000.0,
        "saving": 0.5,
        "start": date(2026, 1, 1),
    }
    return Situation(**(fields | changes))  # type: ignore[arg-type]


def recipe(bits: float = 4) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "advised",
            "model": {"source": "random:llama-2-7b"},
            "data": {"block_size": 2048},
            "quantization": {"weights": {"bits": bits}},
            "qat": {"tokens": 10_000_000, "global_batch_tokens": 262_144},
            "export": [],
        }
    )


@pytest.mark.parametrize("days", [3.0, 5.0])
def test_the_7b_example(days: float) -> None:
    """8 × A100-80GB for 3–5 days is about $2,000–3,000; half the inference cost is $50,000 a year."""
    example = situation_of(
        recipe(),
        parse_cluster("8xA100-80GB"),
        scenario="cloud",
        tolerance=0.02,
        training_days=days,
        serving_cost=100_000,
        tokens_per_day=None,
        price_per_million=None,
        saving=None,
        start=date(2026, 1, 1),
        ptq_loss=6.02 / 5.68 - 1,
    )
    assert 1_800 <= example.training_cost <= 3_200
    advice = advise(example, published())
    assert advice.verdict == "train"
    assert advice.economics.yearly_saving == pytest.approx(50_000)
    assert advice.economics.payback_days == pytest.approx(365 * example.training_cost / 50_000)
    assert advice.economics.break_even is not None
    assert date(2026, 1, 15) < advice.economics.break_even < date(2026, 2, 1)
    assert advice.expectation is not None
    assert advice.expectation.low <= 0.68 <= advice.expectation.high
    # The brief's own W4A8 result, 5.79, lies inside what is expected.
    assert advice.expected_loss is not None
    assert advice.expected_loss[1] <= 5.79 / 5.68 - 1 <= advice.expected_loss[2]


def test_ptq_within_tolerance_ends_the_matter() -> None:
    advice = advise(situation(ptq_loss=0.015), published())
    assert advice.verdict == "ship PTQ"
    assert "Stop, ship PTQ" in advice.reasons[-1]


@pytest.mark.parametrize("scenario", ["cloud", "edge", "mobile"])
def test_eight_bits_are_shipped_without_training(scenario: str) -> None:
    assert cell(scenario, 8).action == "ship PTQ"  # type: ignore[arg-type]
    assert (
        advise(situation(scenario=scenario, weight_bits=8, ptq_loss=0.01), published()).verdict == "ship PTQ"
    )


def test_matrix_has_an_answer_for_every_scenario_and_bits() -> None:
    assert {(scenario, bits) for scenario, bits, _ in rows()} == {
        (s, b) for s in SCENARIOS for b in (8, 4, 3, 2)
    }
    assert cell("mobile", 1.58) == cell("mobile", 2)


def test_small_volume_does_not_pay_in_the_cloud_but_is_beside_the_point_on_a_phone() -> None:
    assert advise(situation(serving_cost=1_000), published()).verdict == "do not train"
    assert advise(situation(serving_cost=1_000, scenario="mobile"), published()).verdict == "train"


def test_cents_are_not_shown_as_nothing() -> None:
    assert [dollars(value) for value in (0.0, 0.04, 2496.4, -310.0)] == ["$0", "$0.04", "$2,496", "−$310"]


def test_nothing_served_never_breaks_even() -> None:
    advice = advise(situation(serving_cost=0), published())
    assert advice.verdict == "stay in full precision"
    assert advice.economics.break_even is None
    assert advice.as_json()["economics"]["break_even"] is None


def test_a_tight_tolerance_asks_for_mixed_precision_or_more_bits() -> None:
    assert advise(situation(tolerance=0.01), published()).verdict == "train with mixed precision"
    assert advise(situation(tolerance=0.001), published()).verdict == "do not train"


def test_unmeasured_ptq_says_so() -> None:
    advice = advise(situation(ptq_loss=None), published())
    assert "not measured" in advice.reasons[0]
    assert advice.ptq_loss == pytest.approx(6.02 / 5.68 - 1, abs=0.001)


@given(
    cost=st.floats(1, 1e6), saved=st.floats(1, 1e7), share=st.floats(0.01, 0.99), factor=st.floats(1.1, 10)
)
def test_break_even_moves_the_right_way(cost: float, saved: float, share: float, factor: float) -> None:
    base = economics_of(situation(training_cost=cost, serving_cost=saved), share)
    dearer = economics_of(situation(training_cost=cost * factor, serving_cost=saved), share)
    larger = economics_of(situation(training_cost=cost, serving_cost=saved * factor), share)
    assert base.payback_days is not None
    assert dearer.payback_days == pytest.approx(base.payback_days * factor)
    assert larger.payback_days == pytest.approx(base.payback_days / factor)
    assert dearer.first_year_net < base.first_year_net < larger.first_year_net


def test_measured_runs_count_and_are_labelled(tmp_path: Path) -> None:
    for index, recovery in enumerate((0.8, 0.9, None)):
        folder = tmp_path / f"run-{index}"
        folder.mkdir()
        quantization = {"weights": {"bits": 4}, "activations": {"bits": 8}, "overrides": []}
        report = {
            "name": folder.name,
            "metrics": {"perplexity": {"recovery": recovery}},
            "recipe": {"quantization": quantization},
        }
        (folder / "report.json").write_text(json.dumps(report))
    found = measured([tmp_path])
    assert [item.recovery for item in found] == [0.8, 0.9]
    assert {item.kind for item in found} == {"measured"}
    study = tmp_path / "study"
    study.mkdir()
    cells = [
        {"label": "W4A8", "recovery": 0.7, "quantization": quantization},
        {"label": "not run", "quantization": None},
        {"label": "learned", "recovery": 1.2, "recovery_interval": [1.1, 1.3], "quantization": quantization},
    ]
    (study / "bits.json").write_text(json.dumps(cells))
    assert [item.work for item in measured([study])] == ["study bits: W4A8"]
    expectation = expect(4, 8, [*found, *published()])
    assert expectation is not None
    assert "2 measured" in expectation.note


def test_nothing_known_about_these_bits() -> None:
    only_four = [Evidence("published", "x", 4, 8, "perplexity", 0.5, "x")]
    assert expect(1, 8, only_four) is None
    assert advise(situation(weight_bits=1, ptq_loss=5.0), only_four).verdict == "do not train"


def test_ptq_loss_of_a_run_is_that_of_its_best_method(tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    stages.mkdir()
    with pytest.raises(UserError, match="no finished stage baseline or ptq"):
        ptq_loss_of(tmp_path)
    (stages / "baseline.json").write_text(json.dumps({"perplexity": 10.0}))
    methods = {"rtn": {"perplexity": 20.0}, "gptq": {"perplexity": 12.0}}
    (stages / "ptq.json").write_text(json.dumps({"methods": methods}))
    assert ptq_loss_of(tmp_path) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "moon", "--serving-cost", "1"], "--scenario 'moon' is not one of cloud, edge"),
        (["--serving-cost", "-5"], "--serving-cost -5 is negative"),
        (["--serving-cost", "1", "--saving", "1.5"], "--saving 1.5 is not a share"),
        (["--price", "-2", "--serving-cost", "1"], "--price -2 is negative"),
        (["--node", "8xA9000", "--serving-cost", "1"], "unknown GPU 'A9000'"),
        ([], "give --serving-cost, or both"),
        (["--tokens-per-day", "-1", "--price-per-million", "1"], "--tokens-per-day -1 is negative"),
    ],
)
def test_impossible_figures_get_one_clear_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(
        app, ["advise", "smollm2-135m-w4a8", "model.source=random:llama-2-7b", *arguments]
    )
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_command_prints_words_json_and_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "advice.png"
    base = ["advise", "smollm2-135m-w4a8", "model.source=random:llama-2-7b", "--no-measure",
            "--training-days", "4", "--tokens-per-day", "1e9", "--price-per-million", "0.27",
            "--runs", str(tmp_path), "--study", str(tmp_path), "--start", "2026-01-01"]  # fmt: skip
    words = CliRunner().invoke(app, [*base, "--plot", str(plot)])
    assert words.exit_code == 0, words.output
    assert "break-even" in words.stdout
    assert "published" in words.stdout
    assert plot.stat().st_size > 10_000
    answer = json.loads(CliRunner().invoke(app, [*base, "--json"]).stdout)
    assert answer["situation"]["serving_cost"] == pytest.approx(98_550)
    assert answer["verdict"] == "train"
    assert len(answer["sensitivity"]) == 6
