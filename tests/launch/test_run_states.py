"""`runs`, `status` and `logs` from the folder and from what Slurm prints, old and new."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from qatapult.launch import attempts, logs
from qatapult.launch.folder import LaunchFolder, Submission, find_run, prepare_run
from qatapult.launch.state import describe
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import write_json


def make_run(runs: Path, name: str, job: str | None = None) -> LaunchFolder:
    launch = prepare_run(load_recipe("tiny-random-w4a8", [f"name={name}", "qat.tokens=12800"]), runs)
    if job is not None:
        launch.write_submission(Submission(where="slurm", job=job))
    return launch


def pretend_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, queue: object, remembered: str = "") -> None:
    """Slurm's commands with fixed answers."""
    folder.mkdir()
    (folder / "queue.json").write_text(json.dumps(queue))
    (folder / "squeue").write_text(f"#!/bin/bash\ncat '{folder}/queue.json'\n")
    answer = f"echo '{remembered}'" if remembered else "exit 1"
    (folder / "scontrol").write_text(f"#!/bin/bash\n{answer}\n")
    (folder / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    for program in ("squeue", "scontrol", "sbatch"):
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


OLD = {"job_id": 7, "job_state": "RUNNING", "state_reason": "None", "nodes": "node[1-2]", "restart_cnt": 1}
NEW = {**OLD, "job_state": ["RUNNING"], "restart_cnt": {"set": True, "infinite": False, "number": 1}}


@pytest.mark.parametrize("entry", [OLD, NEW], ids=["22.05", "24.11"])
def test_a_running_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, object]) -> None:
    launch = make_run(tmp_path / "runs", "r", "7")
    pretend_slurm(monkeypatch, tmp_path / "bin", {"jobs": [entry]})
    lines = [
        {"step": 1, "tokens": 2560, "time": 1.0, "train/loss": 0.5, "train/tokens_per_second": 100.0},
        {"step": 1, "tokens": 2560, "time": 1.0, "eval/perplexity": 20.0, "recovery/perplexity": 0.25},
    ]
    launch.run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "to')
    [state] = describe([launch])
    assert (state.state, state.step, state.loss, state.recovery) == ("running", 1, 0.5, 0.25)
    assert state.seconds_left == pytest.approx((12800 - 2560) / 100)
    assert state.nodes == "node[1-2]"


def test_tasks_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [make_run(tmp_path / "runs", f"r{task}", f"40_{task}") for task in range(4)]
    running = {**OLD, "job_id": 41, "array_job_id": 40, "array_task_id": 0, "array_task_string": ""}
    waiting = {"job_id": 40, "job_state": "PENDING", "array_job_id": 40, "array_task_id": None}
    waiting |= {"array_task_string": "1-2%1", "state_reason": "JobArrayTaskLimit", "restart_cnt": 0}
    pretend_slurm(monkeypatch, tmp_path / "bin", {"jobs": [running, waiting]})
    states = describe(launches)
    assert [state.state for state in states] == ["running", "queued", "queued", "stopped"]
    assert states[1].reason == "JobArrayTaskLimit"
    assert "forgotten by Slurm" in states[3].reason
    assert "qatapult resume r3" in states[3].reason


def test_what_slurm_remembers_of_a_job_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = make_run(tmp_path / "runs", "r", "7")
    pretend_slurm(
        monkeypatch, tmp_path / "bin", {"jobs": []}, "JobId=7 JobState=CANCELLED Reason=None Restarts=0"
    )
    assert describe([launch])[0].state == "cancelled"


def test_a_silent_slurm_hides_nothing_that_the_folder_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done, running, failed = (make_run(tmp_path / "runs", name, "7") for name in ("done", "running", "failed"))
    write_json(done.run.stage("report"), {})
    write_json(done.run.report_json, {"metrics": {"perplexity": {"recovery": 0.9}}})
    for number in range(3):
        attempts.begin(failed, f"7.{number}", "node1", 1)
        attempts.end(failed, f"7.{number}", 1, "")
    states = describe([done, running, failed])
    assert [state.state for state in states] == ["finished", "unknown", "failed"]
    assert states[0].recovery == 0.9
    assert "squeue is not installed" in states[1].reason
    assert "failed 3 times" in states[2].reason


def test_logs_follow_until_nobody_writes(tmp_path: Path) -> None:
    launch = make_run(tmp_path / "runs", "r")
    log = launch.rank_log(0)
    log.write_text("first\n")
    alive = [True]

    def write() -> None:
        time.sleep(0.7)
        with log.open("a") as file:
            file.write("second\n")
        alive[0] = False

    writer = threading.Thread(target=write)
    writer.start()
    assert list(logs.follow(logs.log_files(launch, 0), lambda: alive[0])) == ["first", "second"]
    writer.join()
    with pytest.raises(UserError, match="there are ranks 0 to 0"):
        logs.log_files(launch, 3)


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "known")
    with pytest.raises(UserError, match="there are known"):
        find_run("unknown", tmp_path / "runs")
