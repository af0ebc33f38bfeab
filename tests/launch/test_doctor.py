"""The doctor finds what is missing, says what to do, and checks that ranks reach each other."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qatapult.launch import doctor
from qatapult.launch.doctor import FAIL, OK, WARN, Finding
from qatapult.trainer.cli import app


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_everything_that_is_not_well_comes_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "_version", lambda package: None if package in ("wandb", "accelerate") else "1.0"
    )
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 2**60)
    found = by_name(doctor.examine(tmp_path / "not" / "yet", quick=True))
    assert found["accelerate"] == Finding("accelerate", FAIL, "missing", "pip install accelerate")
    assert found["wandb"].level == WARN
    assert "--runs on a larger disk" in found["disk for runs"].remedy
    assert all(finding.remedy for finding in found.values() if finding.level != OK)


def test_a_tracker_that_does_not_answer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        [no_key] = doctor._network()
        assert "no key" in no_key.detail
        monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
        [well] = doctor._network()
        assert well.level == OK
        assert "very-secret-key" not in json.dumps(well.as_json())
    [silent] = doctor._network()
    assert silent.level == WARN
    assert "WANDB_MODE=offline" in silent.remedy


def test_ranks_reach_each_other_and_ranks_that_do_not_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [well] = doctor._fabric(2)
    assert well.level == OK, well
    assert well.detail.startswith("2 ranks on cpu: all-reduce of 64 MB")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    [ill] = doctor._fabric(2)
    assert ill.level == FAIL
    assert ill.remedy


def test_the_exit_status_is_for_health_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    healthy = CliRunner().invoke(app, ["doctor", "--quick", "--json"])
    assert healthy.exit_code == 0
    assert {"python", "torch", "disk for runs"} <= {finding["name"] for finding in json.loads(healthy.stdout)}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert CliRunner().invoke(app, ["doctor", "--quick"]).exit_code == 1
