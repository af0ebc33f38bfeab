"""The report's chapter about what `qatapult insight` found: what the page shows, and its plots' data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatapult.trainer.report.text import number, percent

#: Models that the analyses compare, with their names in the page.
MODELS = (("full_precision", "full precision"), ("ptq", "PTQ"), ("qat", "QAT"))
_MOST_GROUPS = 14


def chapter(insight: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the template needs, or None where nothing was analysed."""
    if not insight:
        return None
    parts = [part for part in ("weights", "activations", "importance", "scales") if insight.get(part)]
    return {
        "claims": [{**claim, "text": describe(claim)} for claim in insight["claims"]],
        "sentences": insight["sentences"],
        "parts": parts,
        "tokens": insight["tokens"],
        "data": plot_data(insight),
    }


def describe(claim: Mapping[str, Any]) -> str:
    """`19.9 % → 20.0 % → 31.0 %`: at full precision, after PTQ, after training."""
    figures = [claim[key] for key in ("before", "ptq", "after") if key in claim]
    return " → ".join(
        percent(figure, claim["digits"]) if claim["unit"] == "%" else number(figure) for figure in figures
    )


def plot_data(insight: Mapping[str, Any]) -> dict[str, Any]:
    """What the chapter's plots draw; each part only where it was analysed."""
    data: dict[str, Any] = {"models": dict(MODELS)}
    weights, activations = insight.get("weights"), insight.get("activations")
    if weights:
        data["fractions"] = {model: _density(weights[model]["fractions"]) for model, _ in MODELS}
        data["near"] = _by_layer(weights["layers"], "near")
    if activations:
        data["sqnr"] = _by_layer(activations["layers"], "sqnr_db")
        data["worst"] = _by_layer(activations["layers"], "worst_ratio")
    if insight.get("importance"):
        importance = insight["importance"]
        data["pruning"] = {
            "shares": importance["shares"],
            **{model: importance[model]["perplexities"] for model, _ in MODELS},
        }
    if insight.get("scales"):
        data["ablation"] = insight["scales"]["ablation"]["groups"][:_MOST_GROUPS]
    return data


def _density(counts: list[int]) -> list[float]:
    """A histogram over one step as a density: 1 everywhere for weights that know of no grid."""
    whole = sum(counts) or 1
    return [count * len(counts) / whole for count in counts]


def _by_layer(layers: list[Mapping[str, Any]], field: str) -> dict[str, list[Any]]:
    result: dict[str, list[Any]] = {"names": [layer["name"] for layer in layers]}
    return result | {model: [layer[model][field] for layer in layers] for model, _ in MODELS}
