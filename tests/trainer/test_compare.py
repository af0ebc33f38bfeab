"""Runs side by side: figures, the Pareto front, hours without pauses, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.report.compare import compare, pareto, working_hours
from qatapult.trainer.report.curves import Curve

Fixture = Any


def test_rows_have_the_figures_of_the_reports(make_run: Fixture) -> None:
    runs = [make_run("a"), make_run("b", upto="ptq")]
    rows = {row["name"]: row for row in compare(runs)["runs"]}
    assert rows["a"]["packed"] == pytest.approx(16.54)
    assert rows["a"]["seconds"] == 300.0
    assert rows["b"]["packed"] is None
    assert rows["b"]["best_ptq"] == 19.99


def test_cost_is_hours_times_devices_times_price(make_run: Fixture) -> None:
    run = make_run("a")
    run.environment.write_text(json.dumps({"processes": 4}))
    curve = compare([run], price=2.5)["curves"][0]
    assert curve["hours"][-1] == pytest.approx(63 * 3 / 3600)  # 64 steps, 3 s apart
    assert curve["cost"] == pytest.approx([hours * 10 for hours in curve["hours"]])
    assert compare([run])["curves"][0]["cost"] is None


def test_pareto_front() -> None:
    def run(name: str, size: int | None, perplexity: float | None) -> dict[str, Any]:
        return {"name": name, "bytes": size, "packed": perplexity}

    rows = [run("big", 200, 16.0), run("small", 100, 18.0), run("worse", 150, 19.0), run("same", 100, 18.5)]
    assert pareto([*rows, run("unfinished", None, None)]) == ["small", "big"]


def test_pauses_between_jobs_are_not_work() -> None:
    seconds = [0.0, 10.0, 20.0, 9000.0, 9010.0]
    steps = Curve(list(range(5)), seconds, [0.0] * 5)
    evaluations = Curve([2, 4], [21.0, 9011.0], [5.0, 4.0])
    assert working_hours(evaluations, steps) == pytest.approx([20 / 3600, 40 / 3600])


def test_command_prints_a_table_or_json(make_run: Fixture) -> None:
    runs = make_run("a").path.parent
    make_run("b", packed=17.0)
    page = runs / "page.html"
    result = CliRunner().invoke(app, ["compare", str(runs), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert "16.54" in result.output
    assert "17.01" in result.output
    assert page.read_text().count('scope="row"') == 2
    result = CliRunner().invoke(app, ["compare", str(runs / "a"), "--json"])
    assert [row["name"] for row in json.loads(result.stdout)["runs"]] == ["a"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="there is no run"):
        CliRunner().invoke(app, ["compare", str(tmp_path)], catch_exceptions=False)


def test_report_command_prints_the_table_and_json(make_run: Fixture) -> None:
    run = make_run("a")
    result = CliRunner().invoke(app, ["report", str(run.path)])
    assert result.exit_code == 0, result.output
    assert "92 % of what W4A8 channel cost came back" in result.output
    assert run.report_html.exists()
    result = CliRunner().invoke(app, ["report", str(run.path), "--json"])
    assert json.loads(result.stdout) == json.loads(run.report_json.read_text())
