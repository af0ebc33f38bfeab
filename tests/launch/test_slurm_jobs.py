"""Jobs on a real Slurm: two nodes of one gloo rank each, with the real trainer and a small random model."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MINI_SLURM = Path(__file__).parent / "mini_slurm.sh"
RECIPE = "tiny-random-w4a8"
# Long enough for a signal to find the run in the middle of it, on a busy machine too.
STEPS = ("qat.tokens=10240",)
PATIENCE = 400

pytestmark = pytest.mark.timeout(900)


class Cluster:
    """A running cluster, seen from its login node: the tests call the commands that people call."""

    def __init__(self, slurm: Path, folder: Path) -> None:
        self.slurm = slurm
        self.runs = folder / "runs"
        self.profile = folder / "profile.yaml"
        # A step that does not start is given up soon: Slurm may do that to a job whose node is back at once.
        options = "srun_options: ['--immediate=20']"
        self.profile.write_text(
            f"extends: cpu\nprocesses_per_node: 1\ncpus_per_node: 1\ntime: '20'\n{options}\n"
        )
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(slurm / "etc" / "slurm.conf"),
            "MINI_SLURM_DIR": str(slurm),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }

    def call(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done

    def qatapult(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(
            sys.executable, "-m", "qatapult.trainer.cli", *words, "--runs", self.runs, check=check
        )

    def submit(self, name: str, *words: object, nodes: int = 2, profile: Path | None = None) -> str:
        """Submit the small recipe; the job's id."""
        options = ("--profile", profile or self.profile, "--nodes", nodes, "--json")
        return json.loads(self.qatapult("submit", RECIPE, f"name={name}", *STEPS, *words, *options).stdout)[
            0
        ]["job"]

    def state(self, name: str) -> dict[str, Any]:
        return json.loads(self.qatapult("status", name, "--json").stdout)

    def wait(self, name: str, *states: str) -> dict[str, Any]:
        """Wait until a run is in one of some states and its script has written down how the attempt ended."""
        found: dict[str, Any] = {}

        def settled() -> bool:
            found.update(self.state(name))
            return found["state"] in states and found["history"][-1]["event"] == "end"

        self.until(settled, f"{name} is {' or '.join(states)}", every=1.0)
        return found

    def until(self, condition: Callable[[], object], what: str, every: float = 0.1) -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > give_up:
                logs = "\n".join(
                    f"==> {file} <==\n" + "\n".join(file.read_text(errors="replace").splitlines()[-25:])
                    for file in sorted(self.runs.glob("*/logs/*"))
                )
                pytest.fail(f"{what}: not within {PATIENCE} s\n{logs}")
            time.sleep(every)

    def losses(self, name: str) -> list[tuple[int, float]]:
        """Step and loss of every line that training wrote."""
        lines = (self.runs / name / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line["train/loss"]) for line in map(json.loads, lines) if "train/loss" in line]

    def until_step(self, name: str, step: int) -> None:
        metrics = self.runs / name / "metrics.jsonl"
        self.until(
            lambda: metrics.exists() and metrics.read_text().count('"train/loss"') >= step, f"step {step}"
        )


@pytest.fixture(scope="module")
def cluster(mini_slurm: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(mini_slurm, tmp_path_factory.mktemp("login node's"))


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> str:
    """A run that nothing interrupts; it computes while the tests before the first that needs it do."""
    cluster.submit("whole")
    return "whole"


def test_what_slurm_would_refuse_is_one_clear_line(cluster: Cluster, whole: str) -> None:
    for words, complaint in (
        (("--profile", cluster.profile, "--set", "partition=nope"), "(partitions are debug, scavenge)"),
        (("--profile", cluster.profile, "--nodes", 99), "change --nodes or the cluster profile"),
        (("--profile", cluster.profile, "--set", "partitoin=debug"), "did you mean 'partition'?"),
        (("--profile", "cpuu"), "did you mean 'cpu'?"),
    ):
        refused = cluster.qatapult("submit", RECIPE, "name=refused", *words, check=False)
        assert refused.returncode == 2
        assert refused.stderr.startswith("qatapult: error: ")
        assert refused.stderr.count("\n") == 1
        assert complaint in refused.stderr
        assert not (cluster.runs / "refused").exists()


def test_a_run_that_fails_three_times_without_progress_stops_and_says_why(
    cluster: Cluster, whole: str, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/bash\n[ "$2" = accelerate.commands.launch ] && exit 7\nexec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    profile = tmp_path / "broken.yaml"
    profile.write_text(f"extends: {cluster.profile}\npython: '{broken}'\n")
    cluster.submit("broken", nodes=1, profile=profile)
    found = cluster.wait("broken", "failed")
    assert found["attempts"] == 3
    assert "failed 3 times without progress" in found["reason"]
    assert "status 7" in found["reason"]
    assert "failed 3 times" in cluster.qatapult("logs", "broken").stdout
    assert "failed 3 times" in cluster.qatapult("runs").stdout


def test_worlds_of_one_are_refused_before_anything_is_loaded(
    cluster: Cluster, whole: str, tmp_path: Path
) -> None:
    """This Accelerate config starts each node as a world of its own, and says nothing."""
    engine = tmp_path / "engine.yaml"
    engine.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n")
    cluster.submit("alone", "--engine", engine)
    found = cluster.wait("alone", "failed")
    assert "the job was to run 2 ranks and this process is one of 1" in found["reason"]
    assert found["attempts"] == 1
    assert found["stages"] == []


def test_a_signal_before_the_limit_requeues_and_changes_no_loss(cluster: Cluster, whole: str) -> None:
    job = cluster.submit("signalled")
    cluster.until_step("signalled", 3)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    found = cluster.wait("signalled", "finished", "failed")
    assert found["state"] == "finished", found
    ends = [line["how"] for line in found["history"] if line["event"] == "end"]
    assert ends == ["preempted", "finished"]
    assert found["job"] == job

    assert cluster.wait(whole, "finished", "failed")["attempts"] == 1
    uninterrupted = cluster.losses(whole)
    assert len(uninterrupted) == 80
    assert cluster.losses("signalled") == uninterrupted


def test_two_nodes_give_a_report(cluster: Cluster, whole: str) -> None:
    found = cluster.wait(whole, "finished", "failed")
    assert found["state"] == "finished", found
    run = cluster.runs / whole
    assert json.loads((run / "report.json").read_text())["metrics"]["perplexity"]["packed"] > 1
    assert sorted(log.name for log in run.glob("logs/rank-*")) == ["rank-0.log", "rank-1.log"]
    assert found["history"][0]["ranks"] == 2
    assert stat.S_IMODE((run / "launch" / "job.sh").stat().st_mode) == 0o600
    again = cluster.qatapult(
        "submit", RECIPE, "name=whole", *STEPS, "--profile", cluster.profile, check=False
    )
    assert "is finished" in again.stderr


def test_a_sweep_is_a_job_array_with_a_cap(cluster: Cluster, whole: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"name: bits\nrecipe: {RECIPE}\nat_once: 1\nparameters: {{quantization.weights.bits: [8, 4]}}\n"
    )
    sent = json.loads(
        cluster.qatapult("submit", "--sweep", sweep, "--profile", cluster.profile, "--json").stdout
    )
    names = [each["name"] for each in sent]
    assert names == ["bits-000-bits8", "bits-001-bits4"]
    assert sent[0]["job"].partition("_")[0] == sent[1]["job"].partition("_")[0]
    running_together = 0
    while not all((cluster.runs / name / "report.json").exists() for name in names):
        states = [cluster.state(name)["state"] for name in names]
        assert "failed" not in states
        running_together = max(running_together, states.count("running"))
        time.sleep(2)
    assert running_together == 1
    recipes = [(cluster.runs / name / "recipe.yaml").read_text() for name in names]
    assert ["bits: 8" in recipes[0], "bits: 8" in recipes[1].partition("activations")[0]] == [True, False]


def test_cancel_checkpoints_and_does_not_come_back_until_resumed(cluster: Cluster, whole: str) -> None:
    cluster.submit("cancelled", nodes=1)
    cluster.until_step("cancelled", 2)
    cluster.qatapult("cancel", "cancelled")
    found = cluster.wait("cancelled", "cancelled")
    cluster.until(
        lambda: not cluster.call("squeue", "--noheader", "--name=qatapult-cancelled").stdout, "job gone"
    )
    found = cluster.state("cancelled")
    assert found["attempts"] == 1
    assert list((cluster.runs / "cancelled" / "checkpoints").glob("step-*"))
    at_cancel = len(cluster.losses("cancelled"))
    cluster.qatapult("resume", "cancelled")
    cluster.until_step("cancelled", at_cancel + 1)
    steps = [step for step, _ in cluster.losses("cancelled")]
    assert steps == list(range(1, len(steps) + 1))  # nothing lost, nothing twice
    cluster.qatapult("cancel", "cancelled")


@pytest.mark.slow
def test_a_dead_node_brings_the_job_back(cluster: Cluster, whole: str) -> None:
    cluster.wait(whole, "finished")
    job = cluster.submit("survivor", "qat.checkpoints.every_tokens=1280")
    cluster.until(lambda: list((cluster.runs / "survivor" / "checkpoints").glob("step-*")), "a checkpoint")
    cluster.call(MINI_SLURM, "kill-node", 2)

    def waits_for_a_node() -> bool:
        """Not only requeued: Slurm has also cleaned up after the old attempt, as while a node boots."""
        now = cluster.state("survivor")
        return now["state"] == "requeued" and now["reason"] not in ("", "BeginTime")

    cluster.until(waits_for_a_node, "requeue", every=1.0)
    # A job that starts in the very second in which its node comes back meets Slurm's clean-up of its old self.
    cluster.call("scontrol", "hold", job)
    cluster.call(MINI_SLURM, "start-node", 2)
    time.sleep(8)
    cluster.call("scontrol", "release", job)
    found = cluster.wait("survivor", "finished", "failed")
    *earlier, last = (line["how"] for line in found["history"] if line["event"] == "end")
    # The batch script died with its node, or was told to stop because another node died. After that Slurm may be
    # late with a ping and stop the job once more, or hand out an allocation in which no step starts.
    assert earlier[0] in ("died", "preempted")
    assert set(earlier) <= {"died", "preempted", "failed"}
    assert last == "finished"
    assert cluster.losses("survivor") == cluster.losses(whole)


@pytest.mark.slow
def test_an_orphan_does_not_write_into_the_run_that_was_requeued(cluster: Cluster, whole: str) -> None:
    """The daemon dies and its ranks hang; they wake up when the job has long been given to others."""
    cluster.submit("orphaned", nodes=1)
    run = cluster.runs / "orphaned"
    cluster.until_step("orphaned", 3)
    orphan = json.loads((run / "owner.json").read_text())
    node = orphan["host"].removeprefix("node")
    ranks = cluster.call("pgrep", "-f", f"qatapult.launch.rank {run}").stdout.split()
    cluster.call("kill", "-STOP", *ranks)
    cluster.call(MINI_SLURM, "kill-daemon", node)

    def taken_over() -> bool:
        return json.loads((run / "owner.json").read_text())["token"] > orphan["token"]

    cluster.until(taken_over, "another attempt has the run", every=0.5)
    cluster.call("kill", "-CONT", *ranks)
    cluster.until(lambda: "writes no more" in (run / "logs" / "rank-0.log").read_text(), "the orphan notices")
    found = cluster.wait("orphaned", "finished", "failed")
    assert found["state"] == "finished"
    steps = [step for step, _ in cluster.losses("orphaned")]
    assert steps == list(range(1, 81))
    assert [line["event"] for line in found["history"]] == ["begin", "end", "begin", "end"]
    cluster.call(MINI_SLURM, "start-node", node)


@pytest.mark.slow
def test_two_nodes_that_share_no_loopback_find_each_other(cluster_folder: Path, tmp_path: Path) -> None:
    """Each node has a network of its own, so a rendezvous on `localhost` would hang."""
    inside = Cluster(cluster_folder / "apart", tmp_path)
    inside.environment["MINI_SLURM_NETNS"] = "1"
    script = f"""
        set -e
        {MINI_SLURM} start
        trap '{MINI_SLURM} stop' EXIT
        qatapult() {{ {sys.executable} -m qatapult.trainer.cli "$@" --runs {inside.runs}; }}
        qatapult submit {RECIPE} name=apart --profile {inside.profile} --nodes 2
        for ((i = 0; i < {PATIENCE}; i++)); do
          [ -e {inside.runs}/apart/stages/report.json ] && exit 0
          sleep 1
        done
        qatapult status apart; cat {inside.runs}/apart/logs/*; exit 1"""
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script],
        env=inside.environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 ranks, rendezvous node1:" in next((inside.runs / "apart" / "logs").glob("slurm-*")).read_text()
