"""Studies: what they plan, what their runs share, what their pages say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qatapult.trainer.loop.interrupt import INTERRUPTED
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe, load_recipe
from qatapult.trainer.run_folder import RunFolder, write_json
from qatapult.trainer.study.models import model_folder
from qatapult.trainer.study.page import render
from qatapult.trainer.study.plan import PlannedRun, plan_runs
from qatapult.trainer.study.results import CellResult, collect, over_seeds, read_curve
from qatapult.trainer.study.run import run_study, share_before
from qatapult.trainer.study.schema import Study, load_study, shipped_studies
from qatapult.trainer.study.sharing import stage_in_work

STUDY: dict[str, Any] = {
    "name": "mini",
    "title": "Mini",
    "question": "Does it work?",
    "recipe": "tiny-random-w4a8",
    "overrides": ["export=[]"],
    "cells": [
        {"name": "w4", "label": "W4"},
        {"name": "short", "label": "W4, short", "overrides": ["qat.tokens=1280"], "brief": "68 %"},
        {"name": "w2", "label": "W2", "overrides": ["quantization.weights.bits=2"]},
    ],
    "show": ["recovery", "curves"],
    "sizes": {"small": {"seeds": [0, 1]}, "full": {"seeds": [0, 1, 2], "cells": ["w4"]}},
}


def study_with(**changes: Any) -> Study:
    return Study.model_validate(STUDY | changes)


def report(packed: float, ptq: float = 20.0, full: float = 10.0) -> dict[str, Any]:
    return {
        "metrics": {
            "perplexity": {
                "full_precision": full,
                "ptq": ptq,
                "best_ptq": ptq,
                "best_ptq_method": "rtn",
                "ptq_methods": {"rtn": ptq},
                "packed": packed,
                "recovery": (ptq - packed) / (ptq - full),
                "recovery_interval": [0.5, 0.9],
            }
        },
        "curve": [{"tokens": 100, "step": 1, "perplexity": packed}],
        "cost": {"qat": {"seconds": 60.0}},
        "recipe": {
            "qat": {"tokens": 100},
            "ptq": {"initialize_from": "best"},
            "data": {"evaluation_blocks": 2, "block_size": 8},
        },
        "environment": {"device": "a test"},
    }


def finish(run: PlannedRun, runs: Path, packed: float) -> None:
    folder = run.folder(runs)
    write_json(folder.report_json, report(packed))
    write_json(folder.stage("report"), {})


@pytest.mark.parametrize("name", shipped_studies())
@pytest.mark.parametrize("size", ["small", "full"])
def test_shipped_studies_plan_sensible_recipes(name: str, size: str, tmp_path: Path) -> None:
    planned = plan_runs(load_study(name), size, tmp_path)
    names = [run.recipe.name for run in planned]
    assert len(set(names)) == len(names) > 0
    assert len({run.recipe.model_dump_json(exclude={"name"}) for run in planned}) == len(planned)


def test_there_is_a_study_for_every_table_of_the_brief() -> None:
    expected = {"bits", "strategy", "data", "length", "model-size", "tricks", "tasks"}
    assert expected <= set(shipped_studies())


def test_cells_and_seeds_become_runs(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    assert [run.recipe.name for run in planned] == [
        f"mini-small-{cell}-s{seed}" for seed in (0, 1) for cell in ("w4", "short", "w2")
    ]
    assert [run.recipe.seed for run in planned] == [0, 0, 0, 1, 1, 1]
    assert len(plan_runs(study_with(), "full", tmp_path)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": [{"name": "a", "label": "A"}] * 2}, "twice"),
        ({"cells": [{"name": "a", "label": "A", "model": "none"}]}, "`models` does not have"),
        ({"sizes": {"small": {"cells": ["none"]}}}, "no cell none"),
        ({"sizes": {"small": {"model": "none"}}}, "no model 'none'"),
        ({"cell": []}, "did you mean 'cells'"),
    ],
)
def test_studies_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes))
    with pytest.raises(UserError, match=message):
        load_study(file)


def test_unknown_studies_and_sizes_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bits"):
        load_study("bit")
    with pytest.raises(UserError, match="small and full"):
        plan_runs(study_with(), "medium", tmp_path)


def begin(run: PlannedRun, runs: Path, *stages: str) -> RunFolder:
    folder = run.folder(runs)
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(dump_recipe(run.recipe))
    for stage in stages:
        write_json(folder.stage(stage), {"perplexity": 10.0})
        folder.artifact(stage).mkdir()
        (folder.artifact(stage) / "model.safetensors").write_text(run.recipe.name)
    return folder


def test_runs_of_one_format_share_baseline_and_calibration(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    begin(planned[0], tmp_path, "baseline", "ptq")
    assert share_before(planned[1], planned, tmp_path) == ["baseline", "ptq"]
    shared = planned[1].folder(tmp_path)
    assert shared.read_stage("ptq")["shared_from"] == "mini-small-w4-s0"
    assert (shared.artifact("ptq") / "model.safetensors").read_text() == "mini-small-w4-s0"


def test_another_format_shares_the_baseline_only(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    begin(planned[0], tmp_path, "baseline", "ptq")
    assert share_before(planned[2], planned, tmp_path) == ["baseline"]
    assert not planned[2].folder(tmp_path).stage("ptq").exists()


def test_runs_that_began_and_stages_that_are_not_finished_are_left_alone(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    begin(planned[0], tmp_path, "baseline")
    begin(planned[1], tmp_path)
    assert share_before(planned[1], planned, tmp_path) == []
    assert share_before(planned[2], planned, tmp_path) == ["baseline"]


def test_a_run_waits_for_what_another_is_computing(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    running = [(begin(planned[0], tmp_path, "baseline"), planned[0].recipe)]

    def in_work(run: PlannedRun) -> str | None:
        return stage_in_work(run.folder(tmp_path), run.recipe, running)

    assert in_work(planned[1]) == "ptq"
    assert in_work(planned[2]) is None  # another format, and the baseline is there
    begin(planned[3], tmp_path)
    assert in_work(planned[3]) is None  # it has begun, so nothing can be given to it
    write_json(running[0][0].stage("ptq"), {})
    assert in_work(planned[1]) is None


def test_studies_share_a_model_that_they_would_train_alike(tmp_path: Path) -> None:
    bits, tricks = load_study("bits"), load_study("tricks")
    one, other = (model_folder(study, "small", tmp_path, "bytes-1m") for study in (bits, tricks))
    assert one == other
    assert model_folder(bits, "full", tmp_path, "bytes-1m") != one  # blocks of another length


@pytest.mark.slow
def test_text_of_the_teachers_own_is_written_once_and_trained_on(tmp_path: Path) -> None:
    cell = STUDY["cells"][1] | {"own_text": True}
    sizes = {"small": {"seeds": [0], "writing": {"documents": 24, "tokens": 32}}}
    study = study_with(cells=[cell], sizes=sizes)
    heard: list[str] = []
    assert run_study(study, "small", tmp_path, say=heard.append) == []
    file = tmp_path / "mini-small" / "texts" / "short.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == 24
    recipe = load_recipe(tmp_path / "mini-small-short-s0" / "recipe.yaml")
    assert [source.kind for source in recipe.data.train] == ["cpython_docs", "jsonl"]
    run_study(study, "small", tmp_path, say=heard.append)
    assert "short.jsonl: written before" in heard


def test_own_text_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="`writing`"):
        study_with(cells=[STUDY["cells"][0] | {"own_text": True}])


def test_page_has_the_figures_over_seeds_and_the_briefs(tmp_path: Path) -> None:
    study = study_with()
    planned = plan_runs(study, "small", tmp_path)
    for index, packed in ((0, 12.0), (3, 14.0), (1, 15.0), (4, 15.0)):
        finish(planned[index], tmp_path, packed)
    results = collect(planned, tmp_path)
    first = results[0].perplexity("packed")
    assert first.value == 13.0
    assert first.seeds == 2
    assert first.interval == over_seeds([12.0, 14.0])
    text = render(study, "small", results, ["mini-recovery.svg"], "qatapult study mini")
    assert "Not run yet: W2." in text
    assert "| W4 | 10.00 | 20.00 | 13.00 ± 13 | 70 %" in text
    assert "| W4, short |" in text
    assert "68 %" in text
    assert "qatapult study mini" in text
    assert "| W2 |" not in text


def test_a_cost_of_nothing_has_no_recovery(tmp_path: Path) -> None:
    study = study_with()
    planned = plan_runs(study, "small", tmp_path)
    write_json(planned[0].folder(tmp_path).report_json, report(11.0, ptq=10.01))
    write_json(planned[0].folder(tmp_path).stage("report"), {})
    text = render(study, "small", collect(planned, tmp_path), [], "qatapult study mini")
    assert "nothing to recover" in text
    assert "-9900 %" not in text


def test_one_seed_keeps_the_interval_over_documents(tmp_path: Path) -> None:
    planned = plan_runs(study_with(), "small", tmp_path)
    finish(planned[0], tmp_path, 13.0)
    figure = collect(planned, tmp_path)[0].perplexity("recovery")
    assert figure.value == pytest.approx(0.7)
    assert figure.interval == (0.5, 0.9)


def test_interval_over_seeds_is_students_t() -> None:
    low, high = over_seeds([1.0, 2.0, 3.0])
    assert (low + high) / 2 == 2.0
    assert (high - low) / 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_curve_says_where_returns_end_and_where_it_over_fits() -> None:
    values = [30.0, 20.0, 11.0, 10.2, 10.0, 10.1, 10.5]
    curve = [{"tokens": 100 * index, "perplexity": value} for index, value in enumerate(values)]
    reading = read_curve(curve)
    assert reading is not None
    assert reading.best_tokens == 400
    assert reading.flat_tokens == 200
    assert reading.stopped_tokens == 500
    assert reading.stopped_perplexity == 10.0
    assert reading.rose_by == pytest.approx(0.05)
    assert read_curve(curve[:1]) is None


def test_curve_of_a_cell_begins_where_training_began() -> None:
    cell = study_with().cells[0]
    curve = CellResult(cell, [report(15.0)]).curve()
    assert [point["perplexity"] for point in curve] == [20.0, 15.0]


def test_a_study_runs_goes_on_and_survives_a_broken_cell(tmp_path: Path) -> None:
    broken = {"name": "broken", "label": "Broken", "overrides": ["model.source=./nowhere"]}
    study = study_with(cells=[STUDY["cells"][1], broken], sizes={"small": {"seeds": [0]}})
    heard: list[str] = []
    assert run_study(study, "small", tmp_path, say=heard.append) == ["mini-small-broken-s0"]
    results = collect(plan_runs(study, "small", tmp_path), tmp_path)
    assert [result.finished for result in results] == [True, False]
    assert json.loads((tmp_path / "mini-small-short-s0" / "report.json").read_text())["curve"]
    heard.clear()
    run_study(study, "small", tmp_path, say=heard.append)
    assert "done before" in heard[0]


def test_runs_beside_each_other_are_interrupted_and_go_on(tmp_path: Path) -> None:
    broken = {"name": "broken", "label": "Broken", "overrides": ["model.source=./nowhere"]}
    cells = [
        STUDY["cells"][0] | {"overrides": ["qat.tokens=5000000"]},
        broken,
    ]  # minutes: none ends by itself
    file, runs = tmp_path / "study.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(STUDY | {"cells": cells, "sizes": {"small": {"seeds": [0, 1]}}}))
    command = [sys.executable, "-m", "qatapult.trainer.cli", "study", str(file), "--runs", str(runs)]
    long = [RunFolder(runs / f"mini-small-w4-s{seed}") for seed in (0, 1)]

    def steps(run: RunFolder) -> list[int]:
        return [line["step"] for line in run.read_metrics() if "train/loss" in line]

    def interrupt_after(more: int) -> str:
        """Start the study, and stop it when every run has made so many more steps; what it said."""
        before = [len(steps(run)) for run in long]
        process = subprocess.Popen([*command, "--at-once", "2"], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if all(len(steps(run)) >= count + more for run, count in zip(long, before, strict=True)):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == INTERRUPTED
        return said

    assert "mini-small-broken-s0: failed with exit status 2" in interrupt_after(3)
    assert long[1].read_stage("baseline")["shared_from"] == long[0].name
    interrupt_after(3)
    for run in long:
        made = steps(run)
        assert made == list(range(1, len(made) + 1))  # no step is missing, and none was made twice
        assert list(run.checkpoints.iterdir())
