"""`report.html`: one self-contained page about a run, for two minutes or for an hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qatapult.trainer.report.curves import Curve, Curves, phases
from qatapult.trainer.report.inside import chapter
from qatapult.trainer.report.pages import SELF_CONTAINED, compressed_plotly, json_block, templates
from qatapult.trainer.report.text import (
    ABSENT,
    byte_size,
    duration,
    interval,
    metric_columns,
    number,
    percent,
)
from qatapult.trainer.run_folder import RunFolder, write_atomically

#: Points a curve in the page; screens have no more columns than that.
POINTS = 1500

TRAINING_PLOTS = (
    ("loss", "Loss", "train/loss"),
    ("learning-rate", "Learning rate", "train/learning_rate"),
    ("grad-norm", "Gradient norm", "train/grad_norm"),
    ("throughput", "Throughput", "train/tokens_per_second"),
)
LAYER_COLUMNS = (
    ("name", "layer"),
    ("bits", "bits"),
    ("granularity", "granularity"),
    ("scale", "mean scale"),
    ("error_before", "rounding error, PTQ"),
    ("error_after", "rounding error, QAT"),
    ("codes_equal", "codes equal"),
    ("sqnr_db", "SQNR, dB"),
    ("bytes", "size"),
)
INSIDE_PLOTS = {
    "weights": (
        ("fractions", "Where weights lie between grid points; a flat line is chance."),
        ("near", "Share of each layer's weights within 0.1 steps of a grid point; 20 % is chance."),
    ),
    "activations": (
        ("sqnr", "What quantizing each layer's inputs leaves of the signal; higher is better."),
        ("worst", "How far the largest input channel of each layer sticks out."),
    ),
    "importance": (("pruning", "Perplexity when the least important MLP channels are switched off."),),
    "scales": (("ablation", "What the quantization of each block and of each kind of layer still costs."),),
}
SAMPLE_COLUMNS = (
    ("full_precision", "Full precision"),
    ("ptq", "PTQ (round to nearest)"),
    ("best_ptq", "Best PTQ"),
    ("qat", "QAT"),
    ("packed", "QAT, packed integers"),
)


def write_html(run: RunFolder, report: Mapping[str, Any], curves: Curves) -> Path:
    """Write `report.html` of a run.

    Args:
        run: the run's folder.
        report: content of `report.json`.
        curves: of `metrics.jsonl`.

    Returns:
        The page's path.
    """
    write_atomically(run.report_html, render(report, curves))
    return run.report_html


def render(report: Mapping[str, Any], curves: Curves) -> str:
    """The page as text."""
    drawn = page_curves(report, curves)
    inside = chapter(report.get("insight"))
    columns = [
        {"key": key, "title": title}
        for key, title in LAYER_COLUMNS
        if any(layer.get(key) is not None for layer in report["layers"])
    ]
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            report=report,
            policy=SELF_CONTAINED,
            plotly=compressed_plotly(),
            data=json_block(
                {
                    "report": {key: report[key] for key in ("metrics", "training", "cost", "layers")},
                    "curves": drawn,
                    "spans": [asdict(span) for span in phases(report["recipe"])],
                    "inside": inside["data"] if inside else None,
                    "events": [event for event in curves.events if event.get("event") == "rollback"],
                }
            ),
            figure=lambda key: figure(report, key),
            model=(report["recipe"].get("model") or {}).get("source"),
            inside=inside,
            inside_plots=INSIDE_PLOTS,
            way=way_back(report["metrics"]["perplexity"]),
            cards=cards(report),
            table=recovery_table(report),
            devices=devices(report),
            documents=report["metrics"]["perplexity"].get("documents"),
            curve_names=set(drawn),
            points=list(zip(*drawn["eval/perplexity"].values(), strict=True))
            if "eval/perplexity" in drawn
            else [],
            has_training=any(name in drawn for _, _, name in TRAINING_PLOTS),
            training_plots=[plot for plot in TRAINING_PLOTS if plot[2] in drawn],
            alts=alternatives(report, drawn),
            layer_columns=columns,
            layers_sentence=layers_sentence(report),
            sample_columns=SAMPLE_COLUMNS,
            recipe_text=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True, width=100),
            environment=sorted(flatten(report["environment"])),
            show=show_cell,
            duration=duration,
            bytes=byte_size,
            number=number,
        )
    )


def page_curves(report: Mapping[str, Any], curves: Curves) -> dict[str, dict[str, list[float]]]:
    """Curves for the page, `{name: {"x": tokens, "y": values}}`; recovery as the QAT stage has it."""
    drawn = {name: _points(curve) for name, curve in curves.by_name.items()}
    if report["curve"]:
        drawn["eval/perplexity"] = {
            "x": [point["tokens"] for point in report["curve"]],
            "y": [point["perplexity"] for point in report["curve"]],
        }
    return drawn


def way_back(metric: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positions on the bar from PTQ (0 %) to full precision (100 %), in per cent of its width."""
    share = (
        metric.get("recovery") if metric.get("packed") is not None else metric.get("recovery_fake_quantized")
    )
    if share is None:
        return None
    right = max(1.0, share * 1.02)
    place = lambda value: round(100 * min(max(value, 0.0), right) / right, 2)  # noqa: E731
    came_to = metric["packed"] if metric.get("packed") is not None else metric["qat"]
    marks = [
        {
            "at": 0,
            "name": "PTQ, rtn",
            "text": number(metric["ptq"]),
            "side": "down",
            "end": "first",
            "strong": False,
        },
        {
            "at": place(1.0),
            "name": "full precision",
            "text": number(metric["full_precision"]),
            "side": "down",
            "end": "last" if place(1.0) > 90 else "",
            "strong": False,
        },
        {
            "at": place(share),
            "name": f"QAT · {percent(share)} back",
            "text": number(came_to),
            "side": "up",
            "end": "last" if place(share) > 88 else "first" if place(share) < 12 else "",
            "strong": True,
        },
    ]
    best, method = metric.get("best_ptq"), metric.get("best_ptq_method")
    if best is not None and method != "rtn":
        won = (metric["ptq"] - best) / (metric["ptq"] - metric["full_precision"])
        if 0.12 < won < 0.85:
            marks.append(
                {
                    "at": place(won),
                    "name": f"PTQ, {method}",
                    "text": number(best),
                    "side": "down",
                    "end": "middle",
                    "strong": False,
                }
            )
    bounds = metric.get("recovery_interval") if metric.get("packed") is not None else None
    span = (place(bounds[0]), round(place(bounds[1]) - place(bounds[0]), 2)) if bounds else None
    ends = (
        f"PTQ at perplexity {number(metric['ptq'])} to full precision at {number(metric['full_precision'])}"
    )
    return {
        "fill": place(share),
        "whole": f"{10_000 / max(place(share), 0.5):.0f}%",
        "span": span,
        "marks": marks,
        "alt": f"Of the way from {ends}, training came {percent(share)}, to {number(came_to)}; "
        f"95 % interval {interval(bounds)}.",
    }


def cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The handful of figures that a lead asks for first."""
    metric = report["metrics"]["perplexity"]
    result = []

    def card(title: str, text: str, note: str = "") -> None:
        if text != ABSENT:
            result.append({"title": title, "text": text, "note": note})

    card("Recovered", percent(metric["recovery"]), f"95 % interval {interval(metric['recovery_interval'])}")
    best = metric.get("best_ptq_method")
    if best and best != "rtn":
        note = f"of what {best} lost; {interval(metric['recovery_from_best_ptq_interval'])}"
        card("Beyond PTQ", percent(metric["recovery_from_best_ptq"]), note)
    card("Perplexity", number(metric["packed"]), "packed integers, held-out text")
    card("Size", byte_size(report["bytes"]), "packed, on disk")
    seconds = sum(cost.get("seconds") or 0 for cost in report["cost"].values())
    card("Time", duration(seconds) if seconds else ABSENT, ", ".join(devices(report)))
    peak = max((cost.get("peak_memory_bytes") or 0 for cost in report["cost"].values()), default=0)
    card("Peak memory", byte_size(peak) if peak else ABSENT)
    kernels = report["kernels"]
    if kernels.get("linears"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in (kernels.get("by_kind") or {}).items())
        card("Integer linears", f"{kernels.get('integer', 0)} of {kernels['linears']}", kinds)
    return result


def devices(report: Mapping[str, Any]) -> list[str]:
    """What the stages ran on."""
    return sorted({cost["device"] for cost in report["cost"].values() if cost.get("device")})


def recovery_table(report: Mapping[str, Any]) -> list[Any]:
    """Header and rows of the recovery table; cells know their key in `report.json`."""
    columns = metric_columns(report)
    table: list[Any] = [["metric", *(column.title for column in columns)]]
    for name, metric in report["metrics"].items():
        cells = [{"text": name, "key": None, "strong": False}]
        for column in columns:
            key = f"metrics.{name}.{column.key}"
            cells.append(
                {"text": column.show(metric), "key": key, "strong": column.key in ("packed", "recovery")}
            )
        table.append({"cells": cells})
    return table


def figure(report: Mapping[str, Any], key: str) -> str:
    """The figure at `metrics.<name>.<key>` as JSON would write it, for tests and for copying."""
    _, rest = key.split(".", 1)
    name, field = rest.rsplit(".", 1)
    value = report["metrics"][name].get(field)
    if value is None:
        return ""
    return ",".join(map(repr, value)) if isinstance(value, list) else repr(value)


def alternatives(report: Mapping[str, Any], drawn: Mapping[str, Mapping[str, list[float]]]) -> dict[str, str]:
    """What each plot shows, in a sentence, for readers who do not see it."""
    texts = {}
    for name, curve in drawn.items():
        first, last = number(curve["y"][0]), number(curve["y"][-1])
        texts[name] = (
            f"{name} over {curve['x'][-1]:,} tokens: from {first} to {last}, "
            f"lowest {number(min(curve['y']))}, highest {number(max(curve['y']))}."
        )
    metric = report["metrics"]["perplexity"]
    texts["recovery"] = (
        f"Held-out {texts.get('eval/perplexity', 'perplexity: no points yet.')} "
        f"PTQ is at {number(metric['ptq'])}, full precision at {number(metric['full_precision'])}."
    )
    stages = ", ".join(f"{stage} {duration(cost['seconds'])}" for stage, cost in report["cost"].items())
    texts["cost"] = f"Time a stage: {stages}."
    texts["layers"] = layers_sentence(report)
    return texts


def layers_sentence(report: Mapping[str, Any]) -> str:
    """How the packed layers compare with the fake-quantized ones."""
    layers = report["layers"]
    if not layers:
        return ""
    equal = sum(bool(layer.get("codes_equal")) for layer in layers)
    measured = [layer for layer in layers if layer.get("sqnr_db") is not None]
    parts = [f"{equal} of {len(layers)} layers have codes that are equal bit for bit to those of training."]
    if measured:
        worst = min(measured, key=lambda layer: layer["sqnr_db"])
        parts.append(f"The layer that differs most is {worst['name']}, at {number(worst['sqnr_db'])} dB.")
    return " ".join(parts)


def show_cell(key: str, value: Any) -> str:
    """A cell of the layer table."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if key == "bytes":
        return byte_size(value)
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as `(dotted key, text)`."""
    if isinstance(value, Mapping):
        return [
            pair
            for key, item in value.items()
            for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _points(curve: Curve) -> dict[str, list[float]]:
    thin = curve.thinned(POINTS)
    return {"x": list(thin.tokens), "y": list(thin.values)}
