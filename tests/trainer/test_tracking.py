"""Trackers: what wandb was given is read back from an offline run; broken networks do no harm."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from accelerate import Accelerator
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.tracking import wandb_run
from qatapult.trainer.tracking.trackers import Tracking, run_id

Fixture = Any
_BLOCK, _HEADER = 32768, 7


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def recipe_with(*changes: str) -> Recipe:
    return load_recipe("smollm2-135m-w4a8", ["tracking.trackers=[wandb]", *changes])


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def read_wandb(run: RunFolder) -> Iterator[Any]:
    """Records of a run's offline logs, oldest first: LevelDB logs of protocol buffers after a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted((run.logs / "wandb").glob("offline-run-*/*.wandb")):
        data, offset, whole = file.read_bytes(), _HEADER, b""
        while offset + _HEADER <= len(data):
            left = _BLOCK - offset % _BLOCK
            if left < _HEADER:
                offset += left
                continue
            _, length, kind = struct.unpack("<IHB", data[offset : offset + _HEADER])
            offset += _HEADER
            whole += data[offset : offset + length]
            offset += length
            if kind in (1, 4):  # full, last
                record = Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def of_kind(run: RunFolder, kind: str) -> list[Any]:
    """Records of a kind, once wandb's own process has written the end of every attempt."""
    deadline = time.monotonic() + 20
    while True:
        records = [(record.WhichOneof("record_type"), record) for record in read_wandb(run)]
        names = [name for name, _ in records]
        if names.count("exit") == names.count("run") > 0:
            return [getattr(record, kind) for name, record in records if name == kind]
        assert time.monotonic() < deadline, f"wandb wrote {len(names)} records and no end"
        time.sleep(0.05)


def items(record: Any) -> dict[str, Any]:
    pairs = record.item if hasattr(record, "item") else record.update
    return {(pair.key or "/".join(pair.nested_key)): json.loads(pair.value_json) for pair in pairs}


def test_what_wandb_gets(make_run: Fixture, capfd: Fixture) -> None:
    run = make_run()
    changes = ("tracking.group=sweep-1", "tracking.tags=[w4a8, demo]", "tracking.upload_checkpoint=true")
    tracking = Tracking(accelerator(), recipe_with(*changes), run)
    said = capfd.readouterr().err
    assert said.count("running offline") == 1
    assert "wandb sync" in said
    tracking.log({"train/loss": 0.5, "train/kl": 0.4}, step=1, tokens=1024)
    tracking.log({"eval/perplexity": 17.0, "recovery/perplexity": 0.9}, step=1, tokens=1024)
    tracking.alert("rollback", "3 steps with NaN")
    report = {
        "name": "demo",
        "headline": "92 % came back",
        "metrics": {"perplexity": {"packed": 16.5, "ptq": None}},
    }
    run.report_json.write_text("{}")
    run.report_html.write_text("<html></html>")
    run.export("safetensors").mkdir(parents=True)
    (run.export("safetensors") / "model.safetensors").write_bytes(b"weights")
    tracking.finish(report)

    opened = of_kind(run, "run")[0]
    assert (opened.run_id, opened.project, opened.run_group, opened.job_type) == (
        run_id(run),
        "qatapult",
        "sweep-1",
        "trial",
    )
    assert list(opened.tags) == ["w4a8", "demo"]
    config = {update.key: json.loads(update.value_json) for update in opened.config.update}
    assert config["quantization"]["weights"]["bits"] == 4
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(run, "metric")}
    assert axes["*"] == "tokens"
    assert axes["eval/perplexity"] == "tokens"
    best = {metric.name: metric.summary for metric in of_kind(run, "metric")}
    assert best["eval/perplexity"].min
    assert best["recovery/perplexity"].max
    history = [items(line) for line in of_kind(run, "history")]
    assert [(line["tokens"], line["step"]) for line in history] == [(1024, 1), (1024, 1)]
    assert history[0]["train/loss"] == 0.5
    assert history[1]["recovery/perplexity"] == 0.9
    assert [alert.title for alert in of_kind(run, "alert")] == ["rollback", "demo is finished"]
    summary: dict[str, Any] = {}
    for update in of_kind(run, "summary"):
        summary.update(items(update))
    assert summary["final/perplexity/packed"] == 16.5
    stored = {
        artifact.type: [entry.path for entry in artifact.manifest.contents]
        for artifact in of_kind(run, "artifact")
    }
    assert stored == {
        "recipe": ["recipe.yaml"],
        "report": ["report.html", "report.json"],
        "checkpoint": ["safetensors/model.safetensors"],
    }


def test_checkpoint_is_stored_if_asked_for(make_run: Fixture) -> None:
    run = make_run()
    run.report_json.write_text("{}")
    (run.export("safetensors")).mkdir(parents=True)
    (run.export("safetensors") / "model.safetensors").write_bytes(b"weights")
    assert set(wandb_run.artifacts(run, upload_checkpoint=False)) == {"recipe", "report"}
    assert wandb_run.artifacts(run, upload_checkpoint=True)["checkpoint"] == [run.path / "export"]


def test_resumed_run_goes_on_in_the_same_wandb_run(make_run: Fixture) -> None:
    run = make_run()
    for tokens in (1024, 512):  # the second attempt went back to an older checkpoint
        tracking = Tracking(accelerator(), recipe_with(), run)
        tracking.log({"train/loss": 1.0}, step=tokens // 512, tokens=tokens)
        tracking.finish()
        time.sleep(1.1)  # wandb names offline folders by the second
    opened = of_kind(run, "run")
    assert {one.run_id for one in opened} == {run_id(run)}
    assert [items(line)["tokens"] for line in of_kind(run, "history")] == [1024, 512]


def test_a_broken_network_neither_stops_nor_slows(
    make_run: Fixture, monkeypatch: Fixture, capfd: Fixture
) -> None:
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2.0)
        monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT", 2.0)
        run = make_run()
        started = time.monotonic()
        tracking = Tracking(accelerator(), recipe_with(), run)
        for step in range(200):
            tracking.log({"train/loss": 1.0}, step=step, tokens=step)
        tracking.finish()
        assert time.monotonic() - started < 30
    assert "going on offline" in capfd.readouterr().err
    assert len(of_kind(run, "history")) == 200  # nothing was lost: wandb sync sends it later


def test_a_server_that_refuses_makes_it_go_offline(
    make_run: Fixture, monkeypatch: Fixture, capfd: Fixture
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(400)

        do_GET = do_POST

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not wanted in the tests' output."""

    wandb.teardown()
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{refusing.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 3.0)
        run = make_run()
        tracking = Tracking(accelerator(), recipe_with(), run)
        tracking.log({"train/loss": 1.0}, step=1, tokens=1)
        tracking.finish()
        refusing.shutdown()
    wandb.teardown()
    assert "going on offline" in capfd.readouterr().err
    assert len(of_kind(run, "history")) == 1


def test_a_key_is_found_but_never_written(make_run: Fixture, monkeypatch: Fixture, tmp_path: Path) -> None:
    assert not wandb_run.has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret-0123456789\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_run.has_key()
    assert wandb_run.choose_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run = make_run()
    tracking = Tracking(accelerator(), recipe_with(), run)
    tracking.log({"train/loss": 1.0}, step=1, tokens=1)
    tracking.finish()
    written = b"".join(file.read_bytes() for file in run.path.rglob("*") if file.is_file())
    assert b"k" * 40 not in written
    assert b"secret-0123456789" not in written


def test_a_tracker_that_raises_is_dropped_with_one_warning(make_run: Fixture, monkeypatch: Fixture) -> None:
    tracking = Tracking(accelerator(), recipe_with(), make_run())

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(wandb_run.QatapultWandb, "log", fail)
    with pytest.warns(RuntimeWarning, match="wandb failed .OSError: disk is full"):
        tracking.log({"train/loss": 1.0}, step=1, tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracking.log({"train/loss": 1.0}, step=2, tokens=2)
    monkeypatch.undo()
    tracking.finish()


def test_other_processes_and_recipes_without_trackers_do_nothing(make_run: Fixture) -> None:
    run = make_run()
    tracking = Tracking(accelerator(), recipe_with("tracking.trackers=[]"), run)
    tracking.log({"train/loss": 1.0}, step=1, tokens=1)
    tracking.finish()
    assert not (run.path / "tracking.json").exists()


def test_tensorboard_has_tokens_on_its_axis(make_run: Fixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run()
    tracking = Tracking(accelerator(), recipe_with("tracking.trackers=[tensorboard]"), run)
    tracking.log({"train/loss": 0.5}, step=3, tokens=3072)
    tracking.finish()
    events = EventAccumulator(str(run.logs / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3072, 0.5)]


def test_a_tracker_that_is_not_installed_is_refused(make_run: Fixture, monkeypatch: Fixture) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        UserError, match=r"'tensorboard' is not installed: pip install 'qatapult\[tensorboard\]'"
    ):
        Tracking(accelerator(), recipe_with("tracking.trackers=[tensorboard]"), make_run())


def metrics_of(panel: Any) -> list[str]:
    return [getattr(metric, "name", metric) for metric in getattr(panel, "y", None) or panel.metrics]


def test_wandb_pages_show_what_is_logged(make_run: Fixture) -> None:
    from qatapult.trainer.report.summary import summarize
    from qatapult.trainer.tracking.wandb_pages import build_report, build_workspace

    run = make_run()
    lines = list(run.read_metrics())
    logged = {name for line in lines for name in line} | set(wandb_run.flat_metrics(summarize(run)))
    workspace = build_workspace("team", "project")
    panels = [panel for section in workspace.sections for panel in section.panels]
    shown = {name for panel in panels for name in metrics_of(panel)}
    assert {"eval/perplexity", "recovery/perplexity", "train/kl", "final/perplexity/recovery"} <= shown
    assert shown <= logged
    assert workspace.settings.x_axis == "tokens"
    assert {panel.x for panel in panels if hasattr(panel, "x")} == {"tokens"}
    assert workspace._to_model().model_dump_json(by_alias=True).count("eval/perplexity") >= 1
    report = build_report("team", "project", group="sweep-1")
    grids = [block for block in report.blocks if hasattr(block, "runsets")]
    assert {name for grid in grids for panel in grid.panels for name in metrics_of(panel)} == shown
    assert all("sweep-1" in str(grid.runsets[0].filters) for grid in grids)


def test_wandb_pages_need_a_key_and_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["wandb", "dashboard", "--entity", "team"]
    with pytest.raises(UserError, match="no wandb key"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        with pytest.raises(UserError, match="does not answer"):
            CliRunner().invoke(app, command, catch_exceptions=False)
