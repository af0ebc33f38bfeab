"""One owner a run: claims, leases, fencing, and what an orphan may not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qatapult.launch import owner as owners
from qatapult.launch.owner import RunLost, claim, join
from qatapult.trainer.recipe.errors import UserError

CLAIM_AND_WAIT = """
import sys, time
from pathlib import Path
from qatapult.launch.owner import claim
owner = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(120)
"""


def start_owner(run: Path, **environment: str) -> subprocess.Popen[str]:
    """Another process that owns the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_live_process_keeps_its_run_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    other = start_owner(tmp_path)
    try:
        with pytest.raises(UserError, match=f"process {other.pid}"):
            claim(tmp_path)
    finally:
        other.kill()
        other.wait()
    owner = claim(tmp_path)
    owner.check()
    assert owner.ticket.token == 2
    owner.release()


def test_a_requeued_job_fences_off_its_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATAPULT_ATTEMPT", "12.0")
    orphan = claim(tmp_path)
    orphan_rank = join(tmp_path)
    orphan_rank.check()
    other = start_owner(tmp_path, QATAPULT_ATTEMPT="12.1")
    try:
        for mine in (orphan, orphan_rank):
            with pytest.raises(RunLost, match=f"now belongs to job 12, process {other.pid}"):
                mine.check()
        with pytest.raises(RunLost), orphan.writing():
            pytest.fail("an orphan must not write")
        with pytest.raises(RunLost):
            join(tmp_path)
        orphan.release()  # must not take the run from its new owner
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == other.pid
    finally:
        other.kill()
        other.wait()


def test_a_claim_waits_for_a_write_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATAPULT_ATTEMPT", "12.0")
    first = claim(tmp_path)
    written = []

    def take_over() -> None:
        claim(tmp_path)
        written.append("claimed")

    with first.writing():
        thread = threading.Thread(target=take_over)
        thread.start()
        time.sleep(0.3)
        written.append("wrote")
    thread.join(timeout=10)
    assert written == ["wrote", "claimed"]


def test_another_hosts_owner_is_given_up_when_its_lease_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path).release()
    ticket = json.loads((tmp_path / "owner.json").read_text())
    ticket.update(identity="other", host="elsewhere", attempt="5.0")
    (tmp_path / "owner.json").write_text(json.dumps(ticket))
    with pytest.raises(UserError, match="on elsewhere"):
        claim(tmp_path)
    long_ago = time.time() - owners.LEASE_SECONDS - 1
    os.utime(tmp_path / "owner.json", (long_ago, long_ago))
    assert claim(tmp_path).ticket.token == ticket["token"] + 1


def test_the_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "RENEW_SECONDS", 0.05)
    owner = claim(tmp_path)
    long_ago = time.time() - 1000
    os.utime(tmp_path / "owner.json", (long_ago, long_ago))
    time.sleep(0.5)
    assert (tmp_path / "owner.json").stat().st_mtime > time.time() - 100
    owner.release()


def test_another_users_folder_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to user"):
        claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_of_two_claims_at_the_same_time_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_AND_WAIT, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        time.sleep(0.2)
        give_up = time.monotonic() + 20
        while sum(racer.poll() is not None for racer in racers) < 3:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert sum(racer.poll() is None for racer in racers) == 1
        assert json.loads((tmp_path / "owner.json").read_text())["token"] == 1
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
