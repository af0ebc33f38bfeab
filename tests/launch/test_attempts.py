"""What follows from how an attempt ended: requeue, stop, or nothing, and what people are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatapult.launch import attempts
from qatapult.launch.attempts import EXIT_FINISHED, EXIT_STOP, begin, end, write_outcome
from qatapult.launch.folder import LaunchFolder, Submission, prepare_run
from qatapult.trainer.loop.interrupt import INTERRUPTED
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import write_json


@pytest.fixture
def launch(tmp_path: Path) -> LaunchFolder:
    prepared = prepare_run(load_recipe("tiny-random-w4a8"), tmp_path / "runs")
    prepared.write_submission(Submission(where="slurm", job="7"))
    return prepared


def attempt(launch: LaunchFolder, number: int, status: int = 1, notice: str = "") -> attempts.Verdict:
    begun = begin(launch, f"7.{number}", "node1", 2)
    return end(launch, f"7.{number}", status, notice) if begun.exit_status == 0 else begun


def checkpoint(launch: LaunchFolder, step: int) -> None:
    launch.run.checkpoint(step).mkdir(parents=True)


def test_a_failure_is_tried_again_and_the_third_without_progress_is_the_last(launch: LaunchFolder) -> None:
    assert attempt(launch, 0).exit_status == INTERRUPTED
    assert attempt(launch, 1).exit_status == INTERRUPTED
    last = attempt(launch, 2)
    assert last.exit_status == EXIT_STOP
    assert "failed 3 times without progress" in last.reason
    assert str(launch.run.logs) in last.reason
    assert (
        begin(launch, "8.0", "node1", 2).exit_status == EXIT_STOP
    )  # also when somebody submits the script by hand


def test_progress_starts_the_count_anew(launch: LaunchFolder) -> None:
    attempt(launch, 0)
    attempt(launch, 1)
    begin(launch, "7.2", "node1", 2)
    checkpoint(launch, 10)
    assert end(launch, "7.2", 1, "").exit_status == INTERRUPTED
    assert attempt(launch, 3).exit_status == INTERRUPTED
    assert attempt(launch, 4).exit_status == INTERRUPTED
    assert attempt(launch, 5).exit_status == EXIT_STOP


def test_resume_forgives(launch: LaunchFolder) -> None:
    for number in range(3):
        attempt(launch, number)
    launch.append_attempt({"event": "resume"})
    assert attempt(launch, 3).exit_status == INTERRUPTED


def test_the_earliest_error_is_the_reason(launch: LaunchFolder) -> None:
    begin(launch, "7.0", "node1", 2)
    write_outcome(launch, "7.0", 1, 1, "OutOfMemoryError: CUDA out of memory")
    write_outcome(launch, "7.0", 0, 1, "RuntimeError: Connection closed by peer")
    assert end(launch, "7.0", 1, "").reason == "rank 1: OutOfMemoryError: CUDA out of memory"


def test_what_the_user_must_mend_is_not_tried_again(launch: LaunchFolder) -> None:
    begin(launch, "7.0", "node1", 2)
    write_outcome(launch, "7.0", 0, 2, "data.train.0.path does not exist")
    verdict = end(launch, "7.0", 1, "")
    assert (verdict.exit_status, verdict.reason) == (2, "data.train.0.path does not exist")
    assert begin(launch, "7.1", "node1", 2).exit_status == EXIT_STOP


def test_preemption_is_no_failure_but_a_limit_too_short_is(launch: LaunchFolder) -> None:
    for number in range(5):
        assert attempt(launch, number, notice="TERM").how == "preempted"
    short = attempt(launch, 5, notice="USR1")
    assert short.how == "failed"
    assert "ask for more time" in short.reason
    begin(launch, "7.6", "node1", 2)
    checkpoint(launch, 3)
    assert end(launch, "7.6", 0, "USR1").how == "preempted"


def test_a_node_that_died_is_noticed_by_the_next_attempt(launch: LaunchFolder) -> None:
    for number in range(3):
        assert begin(launch, f"7.{number}", "node1", 2).exit_status == 0
    verdict = begin(launch, "7.3", "node1", 2)
    assert verdict.exit_status == EXIT_STOP
    assert "a node died, or the job was killed" in verdict.reason


def test_a_finished_run_does_nothing_more(launch: LaunchFolder) -> None:
    begin(launch, "7.0", "node1", 2)
    write_json(launch.run.stage("report"), {})
    assert end(launch, "7.0", 0, "USR1").exit_status == 0  # not requeued, although a signal came
    assert begin(launch, "7.1", "node1", 2).exit_status == EXIT_FINISHED


def test_a_cancelled_run_does_not_come_back(launch: LaunchFolder) -> None:
    begin(launch, "7.0", "node1", 2)
    launch.write_submission(Submission(where="slurm", job="7", cancelled=True))
    assert end(launch, "7.0", 0, "TERM").exit_status == EXIT_STOP
    assert begin(launch, "7.1", "node1", 2).exit_status == EXIT_STOP


def test_an_orphans_script_neither_records_nor_requeues(launch: LaunchFolder) -> None:
    begin(launch, "7.0", "node1", 2)
    begin(launch, "7.1", "node2", 2)
    before = launch.attempts.read_text()
    assert end(launch, "7.0", 1, "").exit_status == EXIT_STOP
    assert launch.attempts.read_text() == before
