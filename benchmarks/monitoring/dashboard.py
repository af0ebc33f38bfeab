"""How fast the dashboard is over many long runs: python benchmarks/monitoring/dashboard.py [RUNS [POINTS]]

Writes a folder of made-up runs (200 of 10,000 points), serves it on the loopback and asks as its page does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlencode, urljoin
from urllib.request import urlopen

from qatapult.trainer.dashboard.server import MOST_CURVES, build_server
from qatapult.trainer.recipe.loading import dump_recipe, load_recipe

TOKENS = 1024


def main() -> None:
    runs, points = (int(value) for value in [*sys.argv[1:3], *("200", "10000")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder, runs, points)
        server, dashboard, address = build_server(folder)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.perf_counter()
        dashboard.overview.refresh()
        report(f"first look at {runs} runs", started)
        asked = [("run", f"run-{index:03}") for index in range(min(runs, MOST_CURVES))]
        curves = f"api/curves?{urlencode([('metric', 'train/loss'), *asked], quote_via=quote)}"
        for what, path in (
            ("list of runs", "api/runs"),
            (f"curves of {len(asked)} runs, first time", curves),
            (f"curves of {len(asked)} runs, again", curves),
        ):
            started = time.perf_counter()
            size = ask(address, path)
            report(f"{what}, {size / 1e6:.2f} MB", started)
        append(folder / "run-000" / "metrics.jsonl", points, points + 10)
        started = time.perf_counter()
        dashboard.overview.refresh()
        ask(address, curves)
        report("10 new points of one run", started)
        server.shutdown()


def write_runs(folder: Path, runs: int, points: int) -> None:
    recipe = dump_recipe(load_recipe("tiny-random-w4a8"))
    for index in range(runs):
        run = folder / f"run-{index:03}"
        run.mkdir()
        (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
        append(run / "metrics.jsonl", 0, points)


def append(metrics: Path, first: int, last: int) -> None:
    with metrics.open("a", encoding="utf-8") as file:
        for step in range(first, last):
            line = {"step": step + 1, "tokens": TOKENS * (step + 1), "time": 1e9 + step}
            line |= {"train/loss": 2 / (1 + step / 1000), "train/kl": 1 / (1 + step / 1000)}
            line |= {"train/learning_rate": 1e-4, "train/grad_norm": 1.0, "train/tokens_per_second": 1e4}
            file.write(json.dumps(line) + "\n")


def ask(address: str, path: str) -> int:
    with urlopen(urljoin(address, path)) as answer:
        return len(answer.read())


def report(what: str, started: float) -> None:
    print(f"{time.perf_counter() - started:8.3f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
