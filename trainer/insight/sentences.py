"""What the figures of an analysis mean, in sentences that are made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatapult.trainer.insight.weights import NEAR, TAIL
from qatapult.trainer.report.text import number, percent

#: A figure has changed if it did so by more than this share of its former value.
_CHANGE = 0.05
#: Changes are relative to no less than this: a kurtosis of 0.001 that halves has not fallen.
_SMALL = 0.01
# What is said, the part and its figure, whether it is to rise, decimals, unit.
_CLAIMS = (
    ("weights cluster at grid points", "weights", "near", True, 1, "%"),
    ("tails of the weights shrink", "weights", "tail", False, 2, "%"),
    ("kurtosis of the weights falls", "weights", "kurtosis", False, 1, ""),
    ("fewer weights are clipped", "weights", "clipped", False, 2, "%"),
    ("fewer activations fall outside a fixed range", "activations", "beyond_static", False, 2, "%"),
    ("outlier channels become fewer", "activations", "outlier_channels", False, 2, "%"),
    ("importance concentrates in fewer neurons", "importance", "taylor_top", True, 1, "%"),
    ("importance concentrates, by Fisher information", "importance", "fisher_top", True, 1, "%"),
    ("more channels can be pruned", "importance", "tolerated", True, 1, "%"),
)


def sentences(result: Mapping[str, Any]) -> dict[str, str]:
    """One short paragraph for each part that was analysed."""
    writers = {"weights": _weights, "activations": _activations, "importance": _importance, "scales": _scales}
    return {part: write(result[part]) for part, write in writers.items() if result.get(part)}


def claims(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is often said about quantization-aware training, held against this run's figures.

    Returns:
        `[{"claim", "before", "ptq", "after", "verdict", "unit", "digits"}]`. The verdict compares full precision
        with the trained model: `confirmed`, `contradicted` or `no change`; where training itself changed
        nothing it is `by PTQ, not by training` or `against it, by PTQ`.
    """
    found = []
    for claim, part, figure, rises, digits, unit in _CLAIMS:
        if result.get(part):
            full, ptq, qat = (result[part][model][figure] for model in ("full_precision", "ptq", "qat"))
            found.append(
                {
                    "claim": claim,
                    "before": full,
                    "ptq": ptq,
                    "after": qat,
                    "verdict": _verdict(full, ptq, qat, rises),
                    "unit": unit,
                    "digits": digits,
                }
            )
    return found


def _verdict(full: float, ptq: float, qat: float, rises: bool) -> str:
    whole, trained = _moved(full, qat, rises), _moved(ptq, qat, rises)
    if whole == 0:
        return "no change"
    if whole == _moved(full, ptq, rises) and trained == 0:
        return "by PTQ, not by training" if whole > 0 else "against it, by PTQ"
    return "confirmed" if whole > 0 else "contradicted"


def _moved(before: float, after: float, rises: bool) -> int:
    """1 where a figure moved as expected, −1 where it moved the other way, 0 where it stayed."""
    change = (after - before) / max(abs(before), _SMALL) * (1 if rises else -1)
    return (change > _CHANGE) - (change < -_CHANGE)


def _weights(part: Mapping[str, Any]) -> str:
    full, ptq, qat = part["full_precision"], part["ptq"], part["qat"]
    pulled = (
        "pulled weights towards"
        if qat["near"] > full["near"] * (1 + _CHANGE)
        else "did not pull weights towards"
    )
    text = (
        f"Training {pulled} grid points: {percent(qat['near'], 1)} of them lie within {NEAR} steps of "
        f"one, against "
        f"{percent(full['near'], 1)} before (20 % would be chance). "
        f"{percent(part['changed'], 1)} of the codes differ from those that training started from. "
        f"Beyond {TAIL:g} standard deviations lie {percent(qat['tail'], 2)} (at full precision "
        f"{percent(full['tail'], 2)}, after PTQ {percent(ptq['tail'], 2)}; a normal distribution has 0.27 %), "
        f"excess kurtosis is {number(qat['kurtosis'])} ({number(full['kurtosis'])}, after PTQ "
        f"{number(ptq['kurtosis'])}). "
        f"Clipped are {percent(qat['clipped'], 2)} of the weights, {percent(ptq['clipped'], 2)} after PTQ."
    )
    if part["snapshots"] >= 3:
        text += (
            f" Over the {part['snapshots']} stored states {percent(part['oscillating'], 1)} of the "
            f"weights turned back "
            "to a code that they had left."
        )
    return text


def _activations(part: Mapping[str, Any]) -> str:
    full, ptq, qat = part["full_precision"], part["ptq"], part["qat"]
    worst = max(part["layers"], key=lambda layer: layer["qat"]["worst_ratio"])
    entry = worst["qat"]
    text = (
        f"The largest outlier after training is channel {entry['worst_channel']} of the input of "
        f"{worst['name']}: "
        f"{entry['worst_ratio']:,.0f} times the median channel. "
    )
    if qat["sqnr_db"] is not None:
        text += (
            f"Quantizing the inputs leaves {qat['sqnr_db']:.1f} dB of signal to noise on average "
            f"({full['sqnr_db']:.1f} dB at full precision, {ptq['sqnr_db']:.1f} dB after PTQ). "
        )
    if qat["clipped"] == 0:
        text += "Nothing is clipped: each token's range fits its values. "
    text += (
        f"A range fixed on full precision would leave {percent(qat['beyond_static'], 2)} outside "
        f"({percent(ptq['beyond_static'], 2)} after PTQ). "
    )
    massive = qat["massive"]
    if massive:
        top = massive[0]
        text += (
            f"The residual stream has massive activations in {len(massive)} channels, the largest "
            f"{top['value']:,.0f} in "
            f"channel {top['channel']} from layer {top['layers'][0]} on, "
            f"{percent(top['at_first_token'])} of them at the "
            "first token. "
        )
    sinks = qat["sinks"]
    return (
        text + f"On average {percent(sum(sinks) / len(sinks))} of the attention sinks into the first token."
    )


def _importance(part: Mapping[str, Any]) -> str:
    full, ptq, qat = part["full_precision"], part["ptq"], part["qat"]
    return (
        f"The most important tenth of the MLP channels carries {percent(qat['taylor_top'], 1)} of the "
        f"importance after "
        f"training, {percent(full['taylor_top'], 1)} at full precision (by Fisher information "
        f"{percent(qat['fisher_top'], 1)} and {percent(full['fisher_top'], 1)}). Without the least important "
        f"channels the "
        f"perplexity rises by {percent(part['rise'])} when {percent(full['tolerated'], 1)} are gone at "
        f"full precision, "
        f"{percent(ptq['tolerated'], 1)} after PTQ and {percent(qat['tolerated'], 1)} after training."
    )


def _scales(part: Mapping[str, Any]) -> str:
    groups = part["ablation"]["groups"]
    blocks = [group for group in groups if group["name"].startswith("block ")]
    roles = [group for group in groups if not group["name"].startswith("block ")]
    direction = "grew" if part["mean"] > 0 else "shrank"
    text = (
        f"Scales {direction} by {percent(abs(2 ** part['mean'] - 1), 1)} on average; "
        f"{percent(part['moved'])} of them "
        "moved by more than 5 %. "
    )
    if blocks and roles and roles[0]["cost"] > 0:
        text += (
            f"What costs most now is {roles[0]['name']} (perplexity "
            f"{number(part['ablation']['perplexity'])} → "
            f"{number(roles[0]['perplexity'])} without its quantization) and {blocks[0]['name']} "
            f"(→ {number(blocks[0]['perplexity'])}). To win that back, give those layers more bits: an "
            f"override for "
            f"*.{roles[0]['name']} in the recipe, or `qatapult search`."
        )
    elif blocks and roles:
        worst = roles[-1]
        text += (
            f"No kind of layer costs anything by itself any more: trained weights rely on being rounded, and without "
            f"the quantization of {worst['name']} the perplexity rises from "
            f"{number(part['ablation']['perplexity'])} to {number(worst['perplexity'])}. The block that costs "
            f"most is {blocks[0]['name']} (→ {number(blocks[0]['perplexity'])})."
        )
    ablation = part["ablation"]
    text += f" Each was switched off alone, on {ablation['tokens']:,} tokens"
    if ablation["blocks_tried"] < ablation["blocks"]:
        text += f"; tried were {ablation['blocks_tried']} of {ablation['blocks']} blocks, evenly spread"
    text += "."
    return text
