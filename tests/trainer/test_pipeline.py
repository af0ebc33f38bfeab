"""The main job on a small random model: stages, resume, refusals. Every run is a process of its own, as a user's is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qatapult.trainer.run_folder import RunFolder

RECIPE = "tiny-random-w4a8"
INTERRUPTED = 85


def command(runs: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qatapult.trainer", RECIPE, "export=[]", *overrides, "--runs", str(runs)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def train(runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, *overrides), env=environment(), capture_output=True, text=True, timeout=240
    )


def losses(run: RunFolder) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in run.read_metrics() if "train/loss" in line}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    done = train(runs)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    return RunFolder(runs / RECIPE)


def test_a_run_leaves_everything_that_the_design_names(finished: RunFolder) -> None:
    assert finished.finished() == ["baseline", "ptq", "qat", "packed", "export", "report"]
    for path in (
        finished.recipe,
        finished.environment,
        finished.metrics,
        finished.report_json,
        finished.report_html,
    ):
        assert path.stat().st_size > 0
    report = json.loads(finished.report_json.read_text())
    figures = report["metrics"]["perplexity"]
    assert figures["packed"] == finished.read_stage("packed")["perplexity"]
    assert set(report["cost"]) >= {"baseline", "ptq", "qat", "packed"}


def test_training_recovers_most_of_the_loss(finished: RunFolder) -> None:
    kl = [line["train/kl"] for line in finished.read_metrics() if "train/kl" in line]
    assert sum(kl[-8:]) / 8 < 0.75 * sum(kl[:4]) / 4


def test_packed_model_is_the_trained_one_in_integers(finished: RunFolder) -> None:
    packed = finished.read_stage("packed")
    assert packed["parity"]["codes_equal"]
    assert packed["parity"]["sqnr_db"] > 40
    # Random weights give near ties: one token in a hundred may flip. Real models are held to 99.5 %.
    assert packed["parity"]["top1_agreement"] >= 0.98
    kernels = packed["kernels"]
    assert (kernels["linears"], kernels["integer"], kernels["by_kind"]) == (14, 14, {"int4 × int8": 14})
    assert kernels["products"]["integer"] > 0
    assert kernels["products"]["float"] == 0
    assert packed["perplexity"] == pytest.approx(finished.read_stage("qat")["perplexity"], rel=2e-3)


def test_the_same_command_again_does_nothing_twice(finished: RunFolder) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in (finished.path / "stages").rglob("*") if path.is_file()
    }
    again = train(finished.path.parent)
    assert again.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "perplexity" in again.stdout


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(finished: RunFolder) -> None:
    refused = train(finished.path.parent, "seed=7")
    assert refused.returncode == 2
    assert "seed: 0 → 7" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_bit_for_bit(
    finished: RunFolder, tmp_path: Path, number: signal.Signals
) -> None:
    run = RunFolder(tmp_path / RECIPE)
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(run, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, errors
    assert "same command goes on" in errors
    assert 3 <= len(losses(run)) < 20
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run) == losses(finished)
    assert run.read_stage("packed")["losses"] == finished.read_stage("packed")["losses"]


def test_a_killed_run_goes_on_bit_for_bit(finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / RECIPE)
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(run, 8)
    process.kill()
    process.wait(timeout=60)
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run) == losses(finished)


def wait_for_step(run: RunFolder, step: int) -> None:
    deadline = time.monotonic() + 120
    while not run.metrics.exists() or len(losses(run)) < step:
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["qat.tokns=5"], "did you mean 'tokens'?"),
        (["quantization.weights.granularity=group"], "group_size"),
        (["quantization.weights={bits: 4, granularity: group, group_size: 48}"], "does not divide"),
        (["quantization.weights.bits=5"], "not one of 8, 4, 3, 2, 1.58, 1"),
        (["data.train=[{kind: text, path: nowhere.txt}]"], "nowhere.txt"),
        (["data.train=[{kind: cpython_docs, documents: 1}]"], "less than one block"),
        (["model.source=random:huge"], "unknown shape"),
        (["model.source=./no-such-folder"], "no such folder"),
        (["model.source=package:no_such_package/file.gguf"], "not installed"),
        (["name=../elsewhere"], "letters, digits"),
        (["nonsense"], "key=value"),
    ],
)
def test_bad_input_is_one_line_and_status_two_and_writes_nothing(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    refused = train(tmp_path, *overrides)
    assert refused.returncode == 2, refused.stderr
    line = [text for text in refused.stderr.splitlines() if text.startswith("qatapult: error: ")]
    assert len(line) == 1
    assert message in line[0]
    assert "Traceback" not in refused.stderr
    assert not any(tmp_path.iterdir())
