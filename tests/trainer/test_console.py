"""The terminal: plain lines without a terminal and under Slurm, colours elsewhere, silence where asked."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from qatapult.trainer import console as module
from qatapult.trainer.console import Console
from qatapult.trainer.report.summary import summarize_stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _an_ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "NO_COLOR", "RANK", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def some_report() -> dict[str, Any]:
    def part(value: float) -> dict[str, Any]:
        return {"perplexity": value, "losses": [], "tasks": {}}

    stages = {
        "baseline": part(15.3),
        "ptq": {"methods": {"rtn": part(30.87), "gptq": part(19.99)}},
        "qat": part(16.5),
        "packed": part(16.53),
    }
    return summarize_stages(
        "run", stages, {"quantization": {"weights": {"bits": 4}, "activations": {"bits": 8}}}, {}
    )


def progress(console: Console) -> None:
    console.stage("qat", "120 steps")
    with console.progress(100, "qat") as meter:
        for done in (0, 40, 100):
            meter.update(done, loss=0.5, tokens_per_second=1234.5)


def test_plain_lines_in_a_log() -> None:
    log = io.StringIO()
    progress(Console(err=log))
    lines = log.getvalue().splitlines()
    assert lines[0] == "qat       120 steps"
    assert "0/100" in lines[1]
    assert re.search(r"100/100 .*loss 0\.5  1,234 tok/s  in ", lines[-1].replace("1,235", "1,234"))
    assert "\x1b" not in log.getvalue()
    assert len(lines) == 3  # the first and the last, not one an update


def test_a_line_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    log = io.StringIO()
    progress(Console(err=log))
    assert [line.split()[1] for line in log.getvalue().splitlines()[1:]] == ["0/100", "40/100", "100/100"]


def test_colours_on_a_terminal_only() -> None:
    terminal = Terminal()
    Console(err=terminal).stage("qat")
    assert "\x1b[" in terminal.getvalue()


def test_no_color_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    Console(out=terminal).table(some_report())
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.getvalue())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    batch = Terminal()
    progress(Console(err=batch))
    assert "\x1b" not in batch.getvalue()


def test_quiet_keeps_the_result_and_warnings() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet=True, out=out, err=err)
    progress(console)
    assert err.getvalue() == ""
    console.warn("the learning rate was halved")
    console.table(some_report())
    assert err.getvalue() == "warning: the learning rate was halved\n"
    assert "recovered" in out.getvalue()


def test_json_leaves_standard_output_to_the_caller() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(as_json=True, out=out, err=err)
    progress(console)
    console.table(some_report())
    assert out.getvalue() == ""
    assert err.getvalue() != ""


def test_only_the_main_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    out, err = io.StringIO(), io.StringIO()
    console = Console(out=out, err=err)
    progress(console)
    console.warn("x")
    console.table(some_report())
    assert (out.getvalue(), err.getvalue()) == ("", "")


def test_table_has_the_figures_and_is_not_cut_in_a_log() -> None:
    out = io.StringIO()
    Console(out=out).table(some_report())
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in out.getvalue().splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert rows["full precision"] == "15.30"
    assert rows["PTQ (rtn)"] == "30.87"
    assert rows["best PTQ"] == "19.99"
    assert rows["packed integers"] == "16.53"
    assert rows["recovered"] == "92 %"
    assert rows["beyond best PTQ"] == "74 %"
    assert "…" not in out.getvalue()


def test_the_table_is_followed_by_what_each_stage_took() -> None:
    cost = {"seconds": 75.0, "tokens": 512, "peak_memory_bytes": 3 * 10**9, "device": "a CPU"}
    report = some_report() | {"cost": {"baseline": cost | {"seconds": 10.0}, "qat": cost}}
    out = io.StringIO()
    Console(out=out).table(report)
    lines = [line.split("|")[1:4] for line in out.getvalue().splitlines() if "min" in line or "10 s" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["baseline", "10 s", "3 GB"],
        ["qat", "1 min 15 s", "3 GB"],
        ["whole run", "1 min 25 s", "3 GB"],
    ]


def test_markup_in_names_is_text() -> None:
    log = io.StringIO()
    Console(err=log).say("[red]run[/red] [1/2]")
    assert log.getvalue() == "[red]run[/red] [1/2]\n"


def test_live_progress_on_a_terminal() -> None:
    terminal = Terminal()
    progress(Console(err=terminal))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "100/100" in shown
    assert "loss 0.5" in shown
