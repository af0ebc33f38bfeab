"""`report.json` and the files of a report, from what the stages left."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from qatapult.trainer.report import write_report
from qatapult.trainer.report.curves import Curve, phases, read_curves
from qatapult.trainer.report.summary import describe_format, summarize
from qatapult.trainer.report.text import byte_size, duration, interval, number, percent
from qatapult.trainer.run_folder import RunFolder

MakeRun = Any


def test_report_json_has_what_the_design_promises(make_run: MakeRun) -> None:
    report = summarize(make_run())
    metric = report["metrics"]["perplexity"]
    for key in (
        "full_precision",
        "ptq",
        "qat",
        "packed",
        "recovery",
        "recovery_interval",
        "full_precision_tuned",
    ):
        assert metric[key] is not None, key
    expected = (metric["ptq"] - metric["packed"]) / (metric["ptq"] - metric["full_precision"])
    assert metric["recovery"] == pytest.approx(expected)
    assert metric["best_ptq"] == min(metric["ptq_methods"].values())
    assert metric["recovery_from_best_ptq"] < metric["recovery"]
    low, high = metric["recovery_interval"]
    assert low < metric["recovery"] < high
    for stage in ("baseline", "ptq", "qat", "packed"):
        assert set(report["cost"][stage]) == {"seconds", "tokens", "peak_memory_bytes", "device"}
    assert report["headline"].startswith(
        f"{round(100 * metric['recovery'])} % of what W4A8 channel cost came back"
    )


def test_recovery_is_that_of_the_packed_model(make_run: MakeRun) -> None:
    """A packed model that is worse than the fake-quantized one must not hide behind it."""
    run = make_run()
    stage = run.read_stage("packed")
    stage["losses"] = [[loss + 0.2 * tokens, tokens] for loss, tokens in stage["losses"]]
    stage["perplexity"] *= math.exp(0.2)
    run.stage("packed").write_text(json.dumps(stage))
    metric = summarize(run)["metrics"]["perplexity"]
    assert metric["recovery"] < metric["recovery_fake_quantized"] - 0.1


@pytest.mark.parametrize(
    ("upto", "sentence"),
    [
        (None, "nothing has been measured yet"),
        ("baseline", "quantization is still to come"),
        ("ptq", "training is still to come"),
        ("qat", "not yet proven on packed integers"),
    ],
)
def test_unfinished_runs_have_a_report(make_run: MakeRun, upto: str | None, sentence: str) -> None:
    run = make_run(upto=upto)
    page = write_report(run)
    report = json.loads(run.report_json.read_text())
    assert sentence in report["headline"]
    assert sentence in page.read_text()
    assert report["metrics"]["perplexity"]["recovery"] is None


def test_report_is_rebuilt_and_plots_lie_beside_it(make_run: MakeRun) -> None:
    run = make_run()
    assert write_report(run) == run.report_html
    first = run.report_html.read_bytes()
    assert write_report(run.path).read_bytes() == first
    names = {path.name for path in run.plots.iterdir()}
    assert {"recovery.png", "recovery.svg", "loss.png", "throughput.png"} <= names
    assert (run.plots / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_models_and_recipes_is_escaped(make_run: MakeRun) -> None:
    run = make_run()
    stage = run.read_stage("packed")
    stage["samples"] = [
        {"prompt": "</script><script>alert(1)</script>", "text": "<img src=x onerror=alert(2)>"}
    ]
    run.stage("packed").write_text(json.dumps(stage))
    page = write_report(run).read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page


def test_notes_say_what_the_headline_does_not(make_run: MakeRun) -> None:
    notes = " ".join(summarize(make_run())["notes"])
    assert "The best PTQ is gptq" in notes
    assert "Control: fine-tuned on the same tokens" in notes


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"weights": {"bits": 4, "granularity": "channel"}, "activations": {"bits": 8}}, "W4A8 channel"),
        (
            {"weights": {"bits": 2, "granularity": "group", "group_size": 64}, "activations": None},
            "W2A16 g64",
        ),
        (
            {"weights": {"bits": 1.58}, "activations": {"bits": 8}, "overrides": [{}, {}]},
            "W1.58A8 channel + 2 overrides",
        ),
    ],
)
def test_formats_have_short_names(quantization: dict[str, Any], expected: str) -> None:
    assert describe_format(quantization) == expected


def test_a_resumed_run_goes_over_its_tokens_once() -> None:
    lines = [{"tokens": t, "step": t, "time": t, "train/loss": 1.0} for t in (1, 2, 3, 4)]
    lines += [
        {"tokens": 3, "step": 3, "time": 9, "train/loss": 0.5},
        {"tokens": 3, "step": 3, "event": "rollback"},
    ]
    curves = read_curves(lines)
    assert curves.get("train/loss") == Curve([1, 2, 3], [1, 2, 9], [1.0, 1.0, 0.5])
    assert [event["event"] for event in curves.events] == ["rollback"]


def test_figures_that_are_not_finite_leave_a_gap() -> None:
    lines = [
        {"tokens": t, "time": t, "train/loss": v} for t, v in ((1, 1.0), (2, float("nan")), (3, float("inf")))
    ]
    assert read_curves(lines).get("train/loss").tokens == [1]


def test_thinning_keeps_ends_and_spikes() -> None:
    curve = Curve(list(range(10_000)), [0.0] * 10_000, [0.0] * 10_000)
    curve.values[4321], curve.values[7654] = 9.0, -9.0
    thin = curve.thinned(200)
    assert len(thin.tokens) <= 202
    assert (thin.tokens[0], thin.tokens[-1]) == (0, 9999)
    assert {4321, 7654} <= set(thin.tokens)
    assert max(thin.values) == 9.0
    assert min(thin.values) == -9.0


def test_phases_are_placed_in_tokens() -> None:
    spans = [{"weights": {"bits": 8}, "fraction": 0.25}, {"weights": {"bits": 4}, "fraction": 0.75}]
    recipe = {"qat": {"tokens": 1000, "schedule": {"phases": spans}}}
    assert [(s.start, s.end, s.label) for s in phases(recipe)] == [(0.0, 250.0, "W8"), (250.0, 1000.0, "W4")]


def test_figures_are_written_for_people() -> None:
    assert [number(v) for v in (16.527, 0.78512, 30, 579_000.4, 1.2e9, None)] == [
        "16.53", "0.785", "30.00", "579,000", "1.2e+09", "–",
    ]  # fmt: skip
    assert percent(0.9204) == "92 %"
    assert interval([0.89, 0.951]) == "89–95 %"
    assert interval([-0.1, 0.5]) == "-10 to 50 %"
    assert [duration(s) for s in (0.25, 41, 200, 7500)] == ["0.25 s", "41 s", "3 min 20 s", "2 h 05 min"]
    assert byte_size(82_400_000) == "82.4 MB"


def test_run_folder_or_path(make_run: MakeRun) -> None:
    run = make_run()
    assert isinstance(run, RunFolder)
    assert write_report(run.path) == run.report_html
