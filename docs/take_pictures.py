"""Take the documentation's pictures of a run: python docs/take_pictures.py [runs/NAME] (needs Chromium).

Without a run, the made-up ones of the tests are shown.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from qatapult.trainer.dashboard.server import build_server
from qatapult.trainer.report import write_report

IMAGES = Path(__file__).parent / "images"


def main(run: Path | None) -> None:
    helper = _load(Path(__file__).parents[1] / "tests" / "trainer" / "conftest.py")
    with tempfile.TemporaryDirectory() as folder, helper.chromium(Path(folder)) as browser:
        if run is None:
            make = helper.run_factory(Path(folder) / "runs")
            for name, final in (("w4a8-40k", 18.5), ("w4a8-80k", 17.2)):
                write_report(make(name, packed=final))
            run = make("example").path
        page = write_report(run.absolute()).as_uri()
        for name, theme, width, height, phone in (
            ("report-light", "light", 1200, 1500, False),
            ("report-dark", "dark", 1200, 1500, False),
            ("report-phone", "light", 390, 844, True),
        ):
            browser.resize(width, height, phone)
            browser.open(page)
            browser.run("setTheme(arguments[0], false)", theme)
            browser.picture(IMAGES / f"{name}.png", whole=False)
        if browser.run("return document.getElementById('inside') !== null"):
            browser.resize(1200, 1900)
            browser.run("document.getElementById('inside').scrollIntoView({behavior: 'instant'})")
            browser.picture(IMAGES / "report-inside.png", whole=False)
        _take_dashboard(browser, run.absolute().parent)


def _take_dashboard(browser: Any, runs: Path) -> None:
    server, dashboard, address = build_server(runs)
    dashboard.overview.refresh()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.resize(1200, 1000)
    browser.open(address)
    browser.run("setTheme('light', false)")
    browser.wait("return document.getElementById('plot-curves').data.length > 0")
    browser.picture(IMAGES / "dashboard.png", whole=False)
    server.shutdown()


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("browser_helper", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
