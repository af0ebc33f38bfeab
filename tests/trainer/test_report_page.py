"""The pages in a real Chromium: no network, no console message, plots draw, figures are right."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from qatapult.trainer.report.compare import compare, write_comparison
from qatapult.trainer.report.curves import read_curves
from qatapult.trainer.report.html import write_html
from qatapult.trainer.report.summary import summarize
from qatapult.trainer.run_folder import RunFolder, write_json

PLOTS = """
const drawn = (plot) => plot.querySelectorAll('.trace path, .points path').length;
return [...document.querySelectorAll('.plot')].map((plot) => [plot.id, drawn(plot)]);
"""
Fixture = Any


@pytest.fixture(scope="module")
def figures(module_run: RunFolder) -> dict[str, Any]:
    """A report that was written, as JSON."""
    report, curves = summarize(module_run), read_curves(module_run.read_metrics())
    write_json(module_run.report_json, report)
    write_html(module_run, report, curves)
    return json.loads(module_run.report_json.read_text())


@pytest.fixture(scope="module")
def page(browser: Fixture, module_run: RunFolder, figures: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A browser without a network that shows the report (opened once), and the report's figures."""
    browser.resize(1200, 900)
    browser.console(), browser.requests()
    browser.open(module_run.report_html.as_uri(), offline=True)
    return browser, figures


def test_opens_without_network_or_console_message(page: Fixture) -> None:
    browser, _ = page
    assert browser.console() == []
    asked = [url for url in browser.requests() if not url.startswith(("chrome:", "data:", "blob:"))]
    assert len(asked) == 1
    assert asked[0].startswith("file:")


def test_every_plot_draws(page: Fixture) -> None:
    browser, _ = page
    drawn = dict(browser.run(PLOTS))
    assert {"plot-recovery", "plot-loss", "plot-learning-rate", "plot-grad-norm", "plot-cost"} <= set(drawn)
    assert all(paths > 0 for paths in drawn.values()), drawn


def test_figures_are_those_of_report_json(page: Fixture) -> None:
    browser, report = page
    assert browser.run("return document.querySelector('h1').textContent") == report["headline"]
    cells = browser.run("""
        const cells = [...document.querySelectorAll('[data-key^="metrics."]')];
        return cells.map((cell) => [cell.dataset.key, cell.dataset.value]);
    """)
    assert {"metrics.perplexity.packed", "metrics.sst2.recovery"} <= {key for key, _ in cells}
    for key, shown in cells:
        _, name, field = key.split(".")
        value = report["metrics"][name].get(field)
        expected = (
            "" if value is None else ",".join(map(repr, value)) if isinstance(value, list) else repr(value)
        )
        assert shown == expected, key


def test_curve_shows_the_points_of_report_json(page: Fixture) -> None:
    browser, report = page
    drawn = browser.run(
        "const t = document.getElementById('plot-recovery').data[0]; return [[...t.x], [...t.y]]"
    )
    assert drawn == [[p["tokens"] for p in report["curve"]], [p["perplexity"] for p in report["curve"]]]
    lines = browser.run("return document.getElementById('plot-recovery').layout.shapes.map(s => s.y0)")
    metric = report["metrics"]["perplexity"]
    assert {
        metric["full_precision"],
        metric["ptq"],
        metric["best_ptq"],
        metric["full_precision_tuned"],
    } <= set(lines)
    labels = browser.run(
        "return document.getElementById('plot-recovery').layout.annotations.map(a => a.text)"
    )
    assert {"W8", "W4"} <= set(labels)  # phases of the schedule
    assert "best checkpoint" in browser.run(
        "return document.getElementById('plot-recovery').data.map(t => t.name)"
    )


def test_theme_switch_redraws_with_readable_contrast(page: Fixture) -> None:
    browser, _ = page
    for theme in ("light", "dark"):
        if browser.run("return document.documentElement.dataset.theme") != theme:
            browser.run("document.getElementById('theme').click()")
        browser.wait(f"return document.documentElement.dataset.theme === '{theme}'")
        faint = browser.run(CONTRAST)
        assert faint == [], f"{theme}: below 4.5 to 1 (WCAG 2.1, AA): {faint}"


def test_keyboard_and_screen_readers(page: Fixture) -> None:
    browser, _ = page
    nameless = browser.run("""
        const parts = [...document.querySelectorAll('[role=img], button, input')];
        return parts.filter((p) => !(p.ariaLabel || p.textContent.trim())).map((p) => p.outerHTML);
    """)
    assert nameless == []
    order = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert order[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(order))
    browser.run("document.querySelector('#layer-table th:last-child button').focus()")
    enter = {"key": "Enter", "windowsVirtualKeyCode": 13}
    browser.devtools("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
    browser.devtools("Input.dispatchKeyEvent", type="keyUp", **enter)
    assert browser.run("return document.querySelector('#layer-table th:last-child').ariaSort") == "ascending"


def test_layer_table_sorts_and_filters(page: Fixture) -> None:
    browser, _ = page
    names = """
        const rows = [...document.querySelectorAll('#layer-table tbody tr')].filter((row) => !row.hidden);
        return rows.map((row) => row.cells[0].textContent);
    """
    browser.run("""
        const heads = [...document.querySelectorAll('#layer-table th')];
        const button = heads.find((head) => head.textContent.startsWith('SQNR')).querySelector('button');
        button.click(); button.click();
    """)
    assert browser.run(names)[0] == "model.layers.3.mlp.down_proj"
    browser.run("""
        const input = document.querySelector('[data-filters]');
        input.value = 'q_proj';
        input.dispatchEvent(new Event('input'));
    """)
    assert browser.run(names) == [f"model.layers.{i}.self_attn.q_proj" for i in (3, 2, 1, 0)]


def test_phone_needs_no_sideways_scrolling(page: Fixture) -> None:
    browser, _ = page
    browser.resize(390, 844, phone=True)
    browser.wait("return document.documentElement.scrollWidth <= 390")
    browser.resize(1200, 900)


def test_prints_in_light_colours_with_everything_unfolded(page: Fixture) -> None:
    browser, _ = page
    browser.run("setTheme('dark', false); dispatchEvent(new Event('beforeprint'))")
    folded = "return [...document.querySelectorAll('details')].filter((part) => !part.open).length"
    assert browser.run("return document.documentElement.dataset.theme") == "light"
    assert browser.run(folded) == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    assert browser.run(folded) > 0


def test_comparison_draws_and_sorts(browser: Fixture, make_run: Fixture) -> None:
    runs = [make_run(f"run-{i}", packed=16 + i) for i in (2, 1)]
    compared = compare(runs, price=2.0)
    browser.resize(1200, 900)
    browser.console()
    browser.open(write_comparison(compared, runs[0].path.parent / "comparison.html").as_uri())
    assert browser.console() == []
    assert all(paths > 0 for _, paths in browser.run(PLOTS))
    first = "return document.querySelector('#runs tbody tr').cells[0].textContent"
    browser.run(
        "[...document.querySelectorAll('#runs th')].find(h => h.textContent === 'packed').firstChild.click()"
    )
    assert browser.run(first) == "run-1"
    browser.run(
        "[...document.querySelectorAll('.choices button')].find(b => b.textContent === 'cost').click()"
    )
    browser.wait("return document.getElementById('plot-curves').layout.xaxis.title.text === 'cost'")
    drawn = browser.run("return document.getElementById('plot-curves').data.map(t => [...t.x])")
    assert drawn == [curve["cost"] for curve in compared["curves"]]


#: Texts whose colour stands out less than 4.5 to 1 from the page or card behind them.
CONTRAST = """
const linear = (v) => (v / 255 <= 0.03928 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const share = [0.2126, 0.7152, 0.0722];
const light = (text) => share.reduce((sum, part, i) => sum + part * linear(rgb(text)[i]), 0);
const behind = (part) => {
  for (; part; part = part.parentElement) {
    const back = getComputedStyle(part).backgroundColor;
    if ((rgb(back)[3] ?? 1) > 0.5) return back;
  }
  return 'rgb(255, 255, 255)';
};
const faint = new Set();
for (const part of document.querySelectorAll('main *')) {
  const text = [...part.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!text || part.closest('.plot')) continue;
  const [front, back] = [getComputedStyle(part).color, behind(part)];
  const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
  if ((high + 0.05) / (low + 0.05) < 4.5) faint.add(`${part.tagName}.${part.className}: ${front} on ${back}`);
}
return [...faint];
"""
