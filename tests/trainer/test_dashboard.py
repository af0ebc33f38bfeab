"""The dashboard: who may read it, that it only reads, and that it reads what is new, not all again."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from qatapult.trainer.dashboard import readers
from qatapult.trainer.dashboard.overview import Overview
from qatapult.trainer.dashboard.readers import CurveReader
from qatapult.trainer.dashboard.server import MOST_CURVES, MOST_POINTS, build_server, is_loopback
from qatapult.trainer.run_folder import RunFolder

Fixture = Any


class Client:
    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.port, self.query = parts.port, parts.query

    def get(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def json(self, path: str) -> Any:
        status, body, _ = self.get(path)
        assert status == 200, body
        return json.loads(body)


@pytest.fixture
def runs(make_run: Fixture) -> Path:
    make_run("a")
    return make_run("b", upto="qat").path.parent


@pytest.fixture
def served(runs: Path) -> Iterator[tuple[Client, str]]:
    yield from serve(runs, "127.0.0.1")


@pytest.fixture
def served_openly(runs: Path) -> Iterator[tuple[Client, str]]:
    yield from serve(runs, "0.0.0.0")


def serve(runs: Path, host: str) -> Iterator[tuple[Client, str]]:
    server, dashboard, address = build_server(runs, host)
    dashboard.overview.refresh()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(address), address
    server.shutdown()
    server.server_close()


def test_states_and_curves(served: Fixture) -> None:
    client, address = served
    assert "token" not in address
    rows = {row["name"]: row for row in client.json("/api/runs")}
    assert set(rows) == {"a", "b"}
    assert rows["a"]["format"] == "W4A8 channel"
    assert rows["b"]["stages"] == ["baseline", "ptq", "qat"]
    curves = client.json("/api/curves?metric=train/loss&run=a&run=nobody")
    assert list(curves) == ["a"]
    assert len(curves["a"]["tokens"]) == len(curves["a"]["hours"]) == len(curves["a"]["values"]) == 64
    version = curves["a"]["version"]
    assert client.json(f"/api/curves?metric=train/loss&run=a:{version}") == {}  # nothing new


def test_only_reading(served: Fixture, runs: Path) -> None:
    client, _ = served
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    for path in ("/", "/api/runs", "/api/curves?run=a", "/api/log?run=a", "/report/a"):
        client.get(path)
    for method in ("POST", "PUT", "DELETE"):
        assert client.get("/api/runs", method)[0] == 501
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.parametrize("name", ["../a", "%2e%2e%2fa", "/etc/passwd", "a/../a", "", "a%00"])
def test_names_are_never_paths(served: Fixture, runs: Path, name: str) -> None:
    (runs / "a" / "report.html").write_text("a report")
    client, _ = served
    assert client.get(f"/report/{name}")[0] == 404
    assert client.get(f"/api/log?run={name}")[0] == 404
    assert client.get("/report/a")[1] == b"a report"


def test_token_is_needed_beyond_the_loopback(served_openly: Fixture) -> None:
    client, address = served_openly
    assert "?token=" in address
    for path in ("/", "/api/runs", "/plotly.js", "/report/a", "/?token=wrong", "/?token="):
        assert client.get(path)[0] == 401
    status, _, headers = client.get(f"/?{client.query}")
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/api/runs", Cookie=cookie.partition(";")[0])[0] == 200
    token = client.query.removeprefix("token=")
    assert client.get("/api/runs", Authorization=f"Bearer {token}")[0] == 200


def test_another_sites_name_for_this_machine_is_refused(served: Fixture) -> None:
    client, _ = served
    assert client.get("/api/runs", Host="attacker.example:80")[0] == 403
    assert client.get("/api/runs", Host="localhost:80")[0] == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("node7", False)],
)
def test_what_counts_as_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def point(step: int, value: float) -> str:
    return json.dumps({"step": step, "tokens": step, "time": float(step), "train/loss": value}) + "\n"


def test_reading_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = CurveReader(file, "train/loss")
    reader.refresh()
    assert reader.curve.tokens == []
    file.write_text(point(1, 1.0) + point(2, 0.5))
    reader.refresh()
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(readers.json, "loads", lambda text: parsed.append(text) or loads(text))
    with file.open("a") as stream:
        stream.write('{"step": 3, "tokens": 3, "eval/perplexity": 9}\n' + point(3, 0.4) + point(4, 0.3)[:20])
    reader.refresh()
    assert reader.curve.values == [1.0, 0.5, 0.4]
    assert [len(loads(text)) for text in parsed] == [1]  # one new line, not the old ones nor another figure's
    with file.open("a") as stream:
        stream.write(point(4, 0.3)[20:])
    reader.refresh()
    assert reader.curve.values == [1.0, 0.5, 0.4, 0.3]


def test_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(point(1, 1.0) + point(2, 0.5) + point(3, 0.4))
    reader = CurveReader(run.metrics, "train/loss")
    reader.refresh()
    replacement = tmp_path / "new"
    replacement.write_text(point(1, 1.0) + point(2, 0.7))
    replacement.replace(run.metrics)
    version = reader.version
    reader.refresh()
    assert reader.curve.values == [1.0, 0.7]
    assert reader.version > version


def test_long_runs_are_thinned_and_many_are_limited(served: Fixture, runs: Path, make_run: Fixture) -> None:
    client, _ = served
    with (runs / "a" / "metrics.jsonl").open("a") as stream:
        stream.writelines(point(100_000 + step, step % 97) for step in range(10_000))
    curves = client.json("/api/curves?metric=train/loss" + "&run=a" * 100)
    assert len(curves["a"]["tokens"]) <= MOST_POINTS + 2
    names = [make_run(f"many-{i}", points=4).name for i in range(MOST_CURVES + 3)]
    query = "&".join(f"run={name}" for name in names)
    assert len(client.json(f"/api/curves?metric=train/loss&{query}")) == MOST_CURVES


def test_overview_describes_only_what_changed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qatapult.trainer.dashboard import overview as module

    described: list[str] = []
    original = module.describe
    monkeypatch.setattr(
        module, "describe", lambda batch: described.extend(one.run.name for one in batch) or original(batch)
    )
    overview = Overview(runs)
    overview.refresh()
    overview.refresh()
    assert described == ["a", "b"]
    with (runs / "b" / "metrics.jsonl").open("a") as stream:
        stream.write(point(10**6, 0.1))
    overview.refresh()
    assert described == ["a", "b", "b"]


def test_page_follows_a_run(browser: Fixture, served: Fixture, runs: Path) -> None:
    _, address = served
    browser.resize(1200, 900)
    browser.devtools("Network.disable")
    browser.console()
    browser.open(address)
    points = "const data = document.getElementById('plot-curves').data; return data.map((t) => t.x.length)"
    browser.wait(f"{points}.join() === '8,8'")
    with (runs / "b" / "metrics.jsonl").open("a") as stream:
        stream.write(
            json.dumps({"step": 70, "tokens": 70 * 1024, "time": 1.7e9, "eval/perplexity": 16.4}) + "\n"
        )
    browser.wait(f"{points}.join() === '8,9'")
    assert [message for message in browser.console() if "favicon" not in message] == []
