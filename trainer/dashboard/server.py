"""The dashboard's web server: the standard library's, because it only ever reads files for a few people."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from qatapult.launch.logs import log_files
from qatapult.trainer.dashboard.overview import Overview
from qatapult.trainer.dashboard.readers import CurveReaders
from qatapult.trainer.report.pages import compressed_plotly, json_block, templates

_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'"
)
_COOKIE = "qatapult-token"
_LOG_BYTES = 64 * 1024
#: Curves in one answer, and points in each: what a screen can show.
MOST_CURVES, MOST_POINTS = 24, 1200


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    body: bytes
    kind: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    encoding: str | None = None


class Dashboard:
    """Answers requests about a folder of runs.

    Args:
        runs: the folder.
        token: needed by every request if given.
        hosts: names under which the page may be asked for; any if None. A page from elsewhere that points its
            own name at this machine (DNS rebinding) is refused that way.
    """

    def __init__(self, runs: Path, token: str | None = None, hosts: frozenset[str] | None = None) -> None:
        self.overview, self.readers = Overview(runs), CurveReaders()
        self.token, self.hosts = token, hosts

    def answer(self, path: str, query: dict[str, list[str]]) -> Answer:
        """Answer a GET request whose sender may read."""
        routes: dict[str, Callable[[dict[str, list[str]]], Answer]] = {
            "/": self._page,
            "/plotly.js": self._plotly,
            "/api/runs": self._runs,
            "/api/curves": self._curves,
            "/api/log": self._log,
        }
        if path in routes:
            return routes[path](query)
        if path.startswith("/report/"):
            return self._report(unquote(path.removeprefix("/report/")))
        return _error(HTTPStatus.NOT_FOUND, "no such page")

    def _page(self, query: dict[str, list[str]]) -> Answer:
        page = templates().get_template("dashboard.html.jinja")
        data = json_block({"most": MOST_CURVES})
        html = page.render(
            policy=_POLICY, plotly=None, data=data, folder=self.overview.runs.resolve().name, most=MOST_CURVES
        )
        return Answer(html.encode(), "text/html; charset=utf-8")

    def _plotly(self, query: dict[str, list[str]]) -> Answer:
        return Answer(base64.b64decode(compressed_plotly()), "text/javascript", encoding="gzip")

    def _runs(self, query: dict[str, list[str]]) -> Answer:
        return _json(self.overview.rows())

    def _curves(self, query: dict[str, list[str]]) -> Answer:
        """`?metric=train/loss&run=a:17&run=b`: curves that are newer than the version behind the name."""
        name = query.get("metric", ["eval/perplexity"])[0]
        found: dict[str, Any] = {}
        for asked in query.get("run", [])[:MOST_CURVES]:
            run_name, _, known = asked.rpartition(":") if ":" in asked else (asked, "", "")
            launch = self.overview.find(run_name)
            if launch is None:
                continue
            reader = self.readers.get(launch.run.metrics, name)
            if str(reader.version) == known:
                continue
            curve = reader.curve.thinned(MOST_POINTS)
            first = reader.curve.times[0] if reader.curve.times else 0.0
            hours = [(time - first) / 3600 for time in curve.times]
            found[run_name] = {
                "version": reader.version,
                "tokens": curve.tokens,
                "hours": hours,
                "values": curve.values,
            }
        return _json(found)

    def _log(self, query: dict[str, list[str]]) -> Answer:
        launch = self.overview.find(query.get("run", [""])[0])
        if launch is None:
            return _error(HTTPStatus.NOT_FOUND, "no such run")
        files = [file for file in log_files(launch, None) if file.is_file()]
        tails = [f"── {file.name}\n{_tail(file)}" for file in files]
        return Answer("\n".join(tails).encode() or b"no log yet", "text/plain; charset=utf-8")

    def _report(self, name: str) -> Answer:
        launch = self.overview.find(name)
        if launch is None or not launch.run.report_html.exists():
            return _error(HTTPStatus.NOT_FOUND, f"no report; write it with: qatapult report {name}")
        return Answer(launch.run.report_html.read_bytes(), "text/html; charset=utf-8")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qatapult", ""

    def __init__(self, dashboard: Dashboard, *arguments: Any) -> None:
        self.dashboard = dashboard
        super().__init__(*arguments)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        refused = self._refused(query)
        if refused is not None:
            self._send(refused)
        elif "token" in query and parts.path == "/":
            # Keep the secret out of the address bar, the history and referrers.
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header(
                "Set-Cookie", f"{_COOKIE}={self.dashboard.token}; HttpOnly; SameSite=Strict; Path=/"
            )
            self.send_header("Location", "/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(self.dashboard.answer(parts.path, query))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: they may carry the token."""

    def _refused(self, query: dict[str, list[str]]) -> Answer | None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or (self.headers.get("Host") or "")
        if self.dashboard.hosts is not None and host not in self.dashboard.hosts:
            return _error(HTTPStatus.FORBIDDEN, "open this page by the address that qatapult printed")
        token = self.dashboard.token
        if token is None:
            return None
        cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        given = [*query.get("token", []), cookie.value if cookie else ""]
        given.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if any(hmac.compare_digest(one.encode(), token.encode()) for one in given):
            return None
        return _error(HTTPStatus.UNAUTHORIZED, "the token is missing; open the address that qatapult printed")

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "max-age=86400" if answer.kind == "text/javascript" else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if answer.encoding:
            self.send_header("Content-Encoding", answer.encoding)
        self.end_headers()
        self.wfile.write(answer.body)


def build_server(
    runs: Path, host: str = "127.0.0.1", port: int = 0
) -> tuple[ThreadingHTTPServer, Dashboard, str]:
    """A server that is bound and not yet serving.

    Args:
        runs: folder of the runs.
        host: address to bind; anything but the loopback gets a token.
        port: 0 for any free one.

    Returns:
        The server, what it shows, and the address to open (with the token where there is one).

    Raises:
        OSError: if the address cannot be bound.
    """
    local = is_loopback(host)
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]", host}) if local else None
    dashboard = Dashboard(runs, None if local else secrets.token_urlsafe(24), hosts)
    server = ThreadingHTTPServer((host, port), partial(_Handler, dashboard))
    server.daemon_threads = True
    address = f"http://{host}:{server.server_address[1]}/"
    return server, dashboard, address if local else f"{address}?token={dashboard.token}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _LOG_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value, separators=(",", ":")).encode())


def _error(status: HTTPStatus, message: str) -> Answer:
    return Answer(f"{message}\n".encode(), "text/plain; charset=utf-8", status)
