"""What is known about recovery: runs of one's own, measured studies, and published figures, each labelled."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["measured", "published"]


@dataclass(frozen=True)
class Evidence:
    """One recovery.

    Attributes:
        kind: `measured` by this program, or `published` by somebody.
        weights: bits of the weights.
        activations: bits of the activations; 16 if they are not quantized.
        recovery: share of the loss of post-training quantization that came back.
        mixed: whether sensitive layers had more bits.
    """

    kind: Kind
    work: str
    weights: float
    activations: float
    metric: str
    recovery: float
    source: str
    mixed: bool = False


@dataclass(frozen=True)
class Expectation:
    """A recovery to expect, with its interval, and what it rests on."""

    middle: float
    low: float
    high: float
    evidence: tuple[Evidence, ...]
    note: str


def published() -> list[Evidence]:
    """Figures of others, from `configs/evidence.yaml`."""
    return [
        Evidence(
            "published",
            entry["work"],
            entry["weights"],
            entry["activations"],
            entry["metric"],
            entry["recovery"],
            entry["source"],
            entry.get("mixed", False),
        )
        for entry in facts()["published"]
    ]


def measured(folders: Sequence[Path]) -> list[Evidence]:
    """Recoveries from `report.json` of finished runs and from the figures of studies below these folders.

    What has no recovery (nothing was lost, or training was left out) is no evidence and is skipped, and so is
    what ended surely beyond full precision: such a model has learned the text.
    """
    found = []
    for folder in folders:
        for file in sorted(folder.rglob("*.json")):
            if file.name == "report.json":
                report = json.loads(file.read_text(encoding="utf-8"))
                figures = report.get("metrics", {}).get("perplexity", {})
                quantization = report.get("recipe", {}).get("quantization")
                found += _evidence(str(report.get("name", file.parent.name)), figures, quantization, file)
            elif folder.name == "study":
                for cell in _study_cells(file):
                    name = f"study {file.stem}: {cell.get('label')}"
                    found += _evidence(name, cell, cell.get("quantization"), file)
    return found


def _study_cells(file: Path) -> list[dict[str, Any]]:
    cells = json.loads(file.read_text(encoding="utf-8"))
    return [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []


def _evidence(
    work: str, figures: dict[str, Any], quantization: dict[str, Any] | None, file: Path
) -> list[Evidence]:
    """One piece, or none where the recovery or the weights' grid is missing, or where it is more than recovery."""
    recovery, interval = figures.get("recovery"), figures.get("recovery_interval")
    if recovery is None or not quantization or not quantization.get("weights"):
        return []
    if interval is not None and interval[0] > 1:
        return []
    activations = quantization.get("activations")
    return [
        Evidence(
            "measured",
            work,
            float(quantization["weights"]["bits"]),
            float(activations["bits"]) if activations else 16,
            "perplexity, packed model",
            float(recovery),
            str(file),
            bool(quantization.get("overrides")),
        )
    ]


def expect(
    weights: float, activations: float, evidence: Sequence[Evidence], mixed: bool = False
) -> Expectation | None:
    """The recovery to expect at these bits, or None if nothing is known about such weights.

    Evidence of the same bits of weights and activations is used alone if there are at least two of it;
    otherwise all of the same weights. The interval spans all that was seen, widened to what the sources
    claim: with a handful of figures from different models, data and budgets a standard error would claim too
        much.
    """
    same_weights = [item for item in evidence if item.weights == weights and item.mixed == mixed]
    exact = [item for item in same_weights if (item.activations < 16) == (activations < 16)]
    used = exact if len(exact) >= 2 else same_weights
    if not used:
        return None
    values = [item.recovery for item in used]
    claims = [entry for entry in facts()["claimed"] if entry["weights"] == weights]
    low = min([*values, *(claim["low"] for claim in claims)])
    high = max([*values, *(claim["high"] for claim in claims)])
    kinds = [sum(item.kind == kind for item in used) for kind in ("measured", "published")]
    note = f"median and range of {kinds[0]} measured and {kinds[1]} published figures"
    return Expectation(statistics.median(values), low, high, tuple(used), note)


def typical_ptq_loss(weights: float, activations: float) -> tuple[float, str]:
    """Relative loss of perplexity by post-training quantization where it was not measured, and its source."""
    rows = [row for row in facts()["typical_ptq_loss"] if row["weights"] == weights]
    if not rows:
        rows = [min(facts()["typical_ptq_loss"], key=lambda row: abs(row["weights"] - weights))]
    row = min(rows, key=lambda row: abs(row["activations"] - activations))
    return row["loss"], row["source"]


def serving_saving(weights: float) -> tuple[float, str]:
    """Share of the serving cost that these weights save against 16 bits, and its source."""
    row = min(facts()["serving_saving"], key=lambda row: abs(row["weights"] - weights))
    return row["saving"], row["source"]


@cache
def facts() -> dict[str, Any]:
    """The data file as it is."""
    text = (files("qatapult.configs") / "evidence.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded
