"""What a search found: a table of layers, an `overrides:` block, JSON, and the Pareto plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_atomically, write_json
from qatapult.trainer.search.refine import pareto
from qatapult.trainer.search.run import SearchResult

_UNITS = {
    "average_bits": "average bits a weight",
    "size_gb": "GB of weights",
    "w8_fraction": "share of weights in 8 bits",
    "tokens_per_second": "seconds a token",
}


def overrides(result: SearchResult) -> list[dict[str, Any]]:
    """The recipe's `quantization.overrides`: one entry for each layer that leaves the recipe's grid."""
    changed: list[dict[str, Any]] = []
    for group, choice, default in zip(result.groups, result.choice, result.reference, strict=True):
        if choice == default:
            continue
        scheme = result.candidates[choice].scheme.model_dump(mode="json", exclude_defaults=True)
        fields = {"bits": int(scheme["bits"]) if float(scheme["bits"]).is_integer() else scheme["bits"]}
        changed += [{"match": layer, "weights": scheme | fields} for layer in group.layers]
    return changed


def write_result(result: SearchResult, recipe: Recipe, folder: Path) -> None:
    """Write `overrides.yaml` (a recipe fragment), `result.json`, `layers.md` and `pareto.png`."""
    kinds = ", ".join(f"{budget.kind}={budget.value:g}" for budget in result.budgets)
    header = (
        f"# Written by `qatapult search` for the recipe {recipe.name}, {kinds}: measured divergence "
        f"{result.divergence:.5f} nats a token, {result.reference_divergence:.5f} without these exceptions.\n"
    )
    body = {"quantization": {"overrides": overrides(result)}}
    write_atomically(folder / "overrides.yaml", header + yaml.safe_dump(body, sort_keys=False))
    write_json(folder / "result.json", result_json(result))
    write_atomically(folder / "layers.md", layers_markdown(result))
    plot(result, folder / "pareto.png")


def result_json(result: SearchResult) -> dict[str, Any]:
    """The result in plain types; divergences are nats a token."""
    return {
        "budgets": {budget.kind: budget.value for budget in result.budgets},
        "reached": {budget.kind: budget.shown(result.choice) for budget in result.budgets},
        "divergence": result.divergence,
        "divergence_predicted": result.predicted,
        "divergence_reference": result.reference_divergence,
        "divergence_judged": result.judged,
        "divergence_judged_reference": result.reference_judged,
        "finals": [
            {
                "origin": finalist.origin,
                "divergence": finalist.divergence,
                "judged": finalist.judged,
                "assignment": [result.candidates[choice].name for choice in finalist.choice],
            }
            for finalist in result.finals
        ],
        "assignment": {
            group.name: result.candidates[choice].name
            for group, choice in zip(result.groups, result.choice, strict=True)
        },
        "overrides": overrides(result),
        "costs": {
            group.name: {c.name: float(row[j]) for j, c in enumerate(result.candidates)}
            for group, row in zip(result.groups, result.costs, strict=True)
        },
        "estimates": {
            name: {group.name: row.tolist() for group, row in zip(result.groups, costs, strict=True)}
            for name, costs in result.estimates.items()
        },
        "front": [{"use": use, "divergence": value, "measured": seen} for use, value, seen in result.front],
        "rank_correlation": rank_correlations(result),
        "divergence_by_measure": result.rivals,
        "measured_changes": result.measured_changes,
        "seconds": result.seconds,
    }


def rank_correlations(result: SearchResult) -> dict[str, float]:
    """Spearman's correlation of each estimate's gains with those that were measured."""
    from scipy.stats import spearmanr

    found = {}
    rows = np.arange(len(result.groups))
    away = np.ones_like(result.costs, dtype=bool)
    away[rows, result.reference] = False
    gains = -result.costs[away]
    for name, costs in result.estimates.items():
        estimated = (costs[rows, result.reference][:, None] - costs)[away]
        if len(gains) > 2 and np.ptp(estimated) > 0 and np.ptp(gains) > 0:
            found[name] = float(spearmanr(gains, estimated).statistic)
    return found


def print_result(result: SearchResult, console: Console, folder: Path) -> None:
    """The headline, and the groups that leave the recipe's grid or nearly did."""
    for budget in result.budgets:
        reached = budget.shown(result.choice)
        console.print(f"{budget.kind}: {reached:.4g} of {budget.value:g}", highlight=False)
    saved = 1 - result.divergence / result.reference_divergence
    console.print(
        f"KL to full precision: {result.reference_divergence:.4f} → {result.divergence:.4f} nats a token "
        f"(−{saved:.0%}; the sum of single changes predicted {result.predicted:.4f}); on other text "
        f"{result.reference_judged:.4f} → {result.judged:.4f}",
        highlight=False,
    )
    console.print(_table(result))
    console.print(_finals(result))
    agree = ", ".join(f"{name} {value:.2f}" for name, value in rank_correlations(result).items())
    console.print(f"Rank correlation with the measured gains: {agree}", style="dim", highlight=False)
    alone = ", ".join(f"{name} {value:.4f}" for name, value in result.rivals.items())
    console.print(f"KL of what each measure alone would choose: {alone}", style="dim", highlight=False)
    console.print(
        f"{result.measured_changes} single changes and {sum(seen for *_, seen in result.front)} whole "
        f"assignments measured in {result.seconds:.0f} s. In a recipe: extends: {folder / 'overrides.yaml'}",
        highlight=False,
    )


def layers_markdown(result: SearchResult) -> str:
    """All groups with their grids and what single changes do, as a Markdown table."""
    names = [candidate.name for candidate in result.candidates]
    lines = ["| layer | weights | grid | " + " | ".join(f"ΔKL {name}" for name in names) + " |"]
    lines.append("|---|---:|---|" + "---:|" * len(names))
    for group, choice, row in zip(result.groups, result.choice, result.costs, strict=True):
        figures = " | ".join(f"{value:+.5f}" for value in row)
        lines.append(f"| {group.name} | {group.weights:,} | {names[choice]} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(result: SearchResult, path: Path) -> None:
    """Use of the budget against divergence: what was measured, its front, and what the program predicts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seen = [(use, value) for use, value, measured in result.front if measured]
    predicted = sorted((use, value) for use, value, measured in result.front if not measured)
    budget = result.budgets[0]
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    axes.plot(*zip(*predicted, strict=True), color="grey", linestyle="--", label="predicted")
    axes.plot(*zip(*seen, strict=True), marker=".", linestyle="", color="tab:blue", label="measured")
    front = [seen[index] for index in pareto(seen)]
    axes.step(*zip(*front, strict=True), where="post", color="tab:blue", label="measured front")
    x, y = [budget.used(result.choice)], [result.divergence]
    axes.plot(x, y, marker="*", markersize=12, linestyle="", color="tab:red", label="chosen")
    axes.axvline(budget.limit, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(_UNITS[budget.kind])
    axes.set_ylabel("KL to full precision, nats a token")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _finals(result: SearchResult, most: int = 6) -> Table:
    """The best finalists: what they reach on the text that found them, and on the other that decides."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("finalist", no_wrap=True)
    for name in ("KL", "KL on other text"):
        table.add_column(name, justify="right")
    for index, finalist in enumerate(result.finals[:most]):
        figures = (f"{finalist.divergence:.4f}", f"{finalist.judged:.4f}")
        table.add_row(finalist.origin, *figures, style="bold" if index == 0 else "dim")
    return table


def _table(result: SearchResult, most: int = 20) -> Table:
    names = [candidate.name for candidate in result.candidates]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("weights", justify="right")
    table.add_column("grid")
    for name in names:
        table.add_column(f"ΔKL {name}", justify="right")
    gains = -result.costs.min(axis=1)
    order = sorted(
        range(len(result.groups)),
        key=lambda index: (result.choice[index] == result.reference[index], -gains[index]),
    )
    for index in order[:most]:
        group, choice = result.groups[index], result.choice[index]
        chosen = choice != result.reference[index]
        table.add_row(
            group.name,
            f"{group.weights:,}",
            names[choice],
            *(f"{value:+.5f}" for value in result.costs[index]),
            style="bold" if chosen else "dim",
        )
    if len(order) > most:
        table.add_row(f"… and {len(order) - most} more", "", "", *("" for _ in names), style="dim")
    return table
