"""Fixtures of the trainer's tests: a real headless Chromium, and run folders without a training run."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from qatapult.trainer.recipe.loading import dump_recipe, load_recipe
from qatapult.trainer.run_folder import RunFolder, write_atomically, write_json


class Browser:
    """Chromium through its WebDriver (https://www.w3.org/TR/webdriver2/), as the pages' tests need it."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        capabilities = {
            "goog:chromeOptions": {"args": [*arguments, "--window-size=1200,900"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{answer['sessionId']}"

    def open(self, url: str, offline: bool = False) -> None:
        """Open a page and wait until its charts are drawn."""
        if offline:
            self.devtools("Network.enable")
            nothing = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            self.devtools("Network.emulateNetworkConditions", **nothing)
        self._call("POST", f"{self._session}/url", {"url": url})
        self.wait("return document.documentElement.dataset.ready === 'true'")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; what it returns."""
        return self._call(
            "POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)}
        )

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Wait until JavaScript returns something true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"waited {seconds} s for: {script}\n{self.console()}"
            time.sleep(0.05)
        return value

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self) -> list[str]:
        """Warnings and errors since the last call, uncaught exceptions and blocked requests among them."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save what the page looks like as PNG."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.loads(error.read())["value"]["message"]) from None


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A running browser whose files lie in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**_environment(), "HOME": str(folder)}
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        session = Browser(port, folder / "profile")
        yield session
        session.close()
    finally:
        driver.terminate()
        driver.wait(timeout=10)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; tests are skipped where it is not installed (apt install chromium-driver)."""
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not installed: apt install chromium chromium-driver")
    with chromium(tmp_path_factory.mktemp("chromium")) as session:
        yield session


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)


class MakeRun(Protocol):
    """Writes a run folder as the stages leave it."""

    def __call__(
        self, name: str = "demo", upto: str | None = "export", points: int = 64, packed: float = 16.53
    ) -> RunFolder: ...


@pytest.fixture(scope="session")
def trainer_for() -> Callable[..., Any]:
    """Builds a trainer of the tiny model in this process, for ten short steps unless it is told otherwise."""
    return build_trainer


def build_trainer(folder: Path, *overrides: str) -> Any:
    from accelerate import Accelerator

    from qatapult.trainer.console import Console
    from qatapult.trainer.data.blocks import load_data
    from qatapult.trainer.distill.teacher import InProcessTeacher
    from qatapult.trainer.loop.metrics import MetricsLog
    from qatapult.trainer.loop.training import Trainer
    from qatapult.trainer.models import load_model, load_tokenizer
    from qatapult.trainer.quantize.prepare import prepare
    from qatapult.trainer.recipe.loading import load_recipe

    recipe = load_recipe("tiny-random-w4a8", ["qat.tokens=1280", "data.evaluation_blocks=2", *overrides])
    model = load_model(recipe.model)
    prepare(model, recipe.quantization, recipe.qat.method)
    run = RunFolder(folder)
    return Trainer(
        Accelerator(cpu=True),
        recipe,
        model,
        InProcessTeacher(load_model(recipe.model)),
        load_data(recipe, load_tokenizer(recipe.model)),
        run.checkpoints,
        MetricsLog(run),
        Console(quiet=True),
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return run_factory(tmp_path)


@pytest.fixture(scope="module")
def module_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One finished run for all tests of a module; they only read it."""
    return run_factory(tmp_path_factory.mktemp("runs"))()


def run_factory(runs: Path) -> MakeRun:
    def make(
        name: str = "demo", upto: str | None = "export", points: int = 64, packed: float = 16.53
    ) -> RunFolder:
        run = RunFolder(runs / name)
        schedule = "{phases: [{weights: {bits: 8}, fraction: 0.25}, {weights: {bits: 4}, fraction: 0.75}]}"
        changes = [f"name={name}", f"qat.tokens={points * 1024}", f"qat.schedule={schedule}"]
        write_atomically(run.recipe, dump_recipe(load_recipe("smollm2-135m-w4a8", changes)))
        write_json(run.environment, {"python": "3.11", "processes": 1, "packages": {"torch": "2.13.0"}})
        results = stage_results(points, packed)
        for stage in list(results)[: list(results).index(upto) + 1 if upto else 0]:
            write_json(run.stage(stage), results[stage])
        if upto not in (None, "baseline", "ptq"):
            lines = (json.dumps(line) for line in metric_lines(points, packed))
            write_atomically(run.metrics, "\n".join(lines) + "\n")
        return run

    return make


def stage_results(points: int, packed: float) -> dict[str, dict[str, Any]]:
    """What each stage writes, with the figures of a first sketch on SmolLM2-135M."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 700, 16)
    hardness = rng.normal(0, 0.25, 16)

    def judged(perplexity: float, accuracy: float, noise: float = 0.02, **more: Any) -> dict[str, Any]:
        losses = hardness + rng.normal(0, noise, 16)
        losses += math.log(perplexity) - (losses * tokens).sum() / tokens.sum()
        task = {"value": accuracy, "standard_error": 0.02, "higher_is_better": True}
        text = f"The with statement <b>wraps</b> & {perplexity}"
        return {
            "perplexity": perplexity,
            "losses": [[float(a * b), int(b)] for a, b in zip(losses, tokens, strict=True)],
            "tasks": {"sst2": task},
            "samples": [{"prompt": "The with statement", "text": text}],
            "cost": {
                "seconds": 60.0,
                "tokens": 8192,
                "peak_memory_bytes": 2 * 10**9,
                "device": "a CPU, 2 threads",
            },
            **more,
        }

    names = [f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "mlp.down_proj")]
    layers = [
        {
            "name": name,
            "bits": 4,
            "granularity": "channel",
            "codes_equal": True,
            "sqnr_db": 60.0 + i,
            "bytes": 10**5,
        }
        for i, name in enumerate(names)
    ]
    rounded = {name: {"scale": 0.02, "error": 0.1 + 0.01 * i} for i, name in enumerate(names)}
    ptq = {"rtn": judged(30.87, 0.62, 0.1, rounding=rounded), "gptq": judged(19.99, 0.74, 0.05)}
    steps = range(0, points + 1, max(points // 8, 1))
    curve = [
        {"step": s, "tokens": s * 1024, "perplexity": packed + 3.5 * math.exp(-5 * s / points)} for s in steps
    ]
    return {
        "baseline": judged(15.3, 0.81),
        "ptq": {"methods": ptq, "initialize_from": "gptq", "cost": ptq["rtn"]["cost"]},
        "qat": judged(
            packed, 0.79, steps=points, tokens=points * 1024, best_step=curve[-1]["step"],
            best_tokens=curve[-1]["tokens"], curve=curve, stopped_early=False, skipped_steps=0, rollbacks=0,
            control=judged(14.9, 0.82),
        ),
        "packed": judged(
            packed + 0.01, 0.785, bytes=110_000_000, rounding=rounded,
            parity={"codes_equal": True, "sqnr_db": 61.2, "top1_agreement": 0.998, "layers": layers},
            kernels={"linears": 8, "integer": 8, "by_kind": {"int4 × int8": 8}},
        ),
        "export": {"formats": {"compressed-tensors": {"path": "export/compressed-tensors", "bytes": 10**8,
                                                      "perplexity": None}}, "cost": ptq["rtn"]["cost"]},
    }  # fmt: skip


def metric_lines(points: int, packed: float) -> Iterator[dict[str, Any]]:
    """Lines of `metrics.jsonl`: one a step, and an evaluation now and then."""
    rng = np.random.default_rng(0)
    for step in range(1, points + 1):
        axes = {"step": step, "tokens": step * 1024, "time": 1.7e9 + 3 * step}
        loss = 0.25 + math.exp(-6 * step / points) + rng.normal(0, 0.03)
        yield {
            **axes,
            "train/loss": loss,
            "train/kl": loss - 0.05,
            "train/learning_rate": 1e-4 * (1 - step / points),
            "train/grad_norm": float(rng.lognormal()),
            "train/tokens_per_second": 340.0 + rng.normal(0, 9),
        }
        if step % max(points // 8, 1) == 0:
            perplexity = packed + 3.5 * math.exp(-5 * step / points)
            yield {**axes, "eval/perplexity": perplexity, "recovery/perplexity": (30.87 - perplexity) / 15.57}
