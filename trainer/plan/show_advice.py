"""Advice in words and tables, and a plot of cost and savings over time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qatapult.trainer.plan.advice import Advice, Economics
from qatapult.trainer.plan.matrix import SCENARIOS, rows
from qatapult.trainer.report.text import dollars


def print_advice(advice: Advice, console: Console) -> None:
    """The verdict with its reasons, the money, its sensitivity, and the evidence."""
    situation = advice.situation
    console.print(f"[bold]{advice.verdict[0].upper()}{advice.verdict[1:]}.[/]", highlight=False)
    for reason in advice.reasons:
        console.print(f"  {reason}", highlight=False)
    console.print(
        f"Matrix, {situation.scenario} at {situation.weight_bits:g} bits: "
        f"{advice.matrix.action} — {advice.matrix.why}.",
        highlight=False,
    )
    console.print(_money(advice))
    if advice.expectation is not None:
        console.print(_evidence(advice))
        console.print(f"Interval: {advice.expectation.note}.", style="dim", highlight=False)


def matrix_table() -> Table:
    """The whole decision matrix."""
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="Decision matrix", title_justify="left"
    )
    for name in ("scenario", "bits", "first", "why"):
        table.add_column(name)
    last = None
    for scenario, bits, cell in sorted(rows(), key=lambda row: (list(SCENARIOS).index(row[0]), -row[1])):
        table.add_row(scenario if scenario != last else "", str(bits), cell.action, cell.why)
        last = scenario
    return table


def plot_advice(advice: Advice, path: Path) -> None:
    """Money over two years: cost of training, savings since, and the sensitivity as thin lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = advice.situation.start
    days = range(0, 731, 5)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, economics in [*advice.sensitivity, ("as given", advice.economics)]:
        base = name == "as given"
        begin = advice.situation.training_days
        net = [
            max(0.0, day - begin) / 365 * economics.yearly_saving - economics.training_cost for day in days
        ]
        dates = [start + timedelta(days=day) for day in days]
        axes.plot(dates, net, label=name, linewidth=2.5 if base else 1, color="black" if base else None)  # type: ignore[arg-type]
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("US dollars since the start")
    axes.legend(fontsize="small")
    figure.autofmt_xdate()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _money(advice: Advice) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("if")
    for name in ("training", "saved a year", "pays back in", "break-even", "first year"):
        table.add_column(name, justify="right")
    for name, economics in [("as given", advice.economics), *advice.sensitivity]:
        table.add_row(name, *_row(economics))
    return table


def _row(economics: Economics) -> list[str]:
    days = economics.payback_days
    return [
        dollars(economics.training_cost),
        dollars(economics.yearly_saving),
        "never" if days is None else f"{days:,.0f} days",
        economics.break_even.isoformat() if economics.break_even else "never",
        dollars(economics.first_year_net),
    ]


def _evidence(advice: Advice) -> Table:
    assert advice.expectation is not None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "work", "metric"):
        table.add_column(name)
    table.add_column("recovery", justify="right")
    table.add_column("source")
    for item in advice.expectation.evidence:
        table.add_row(item.kind, item.work, item.metric, f"{item.recovery:.0%}", item.source)
    return table
