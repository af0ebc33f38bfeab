"""Static plots of a run (PNG and SVG under `plots/`), for papers, slides and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from qatapult.trainer.report.curves import Curves, phases
from qatapult.trainer.report.inside import MODELS

INK, BLUE, ORANGE, GREEN, GREY = "#1f2933", "#2563eb", "#c2410c", "#047857", "#64748b"
_SIZE = (7.2, 4.0)
Draw = Callable[[Axes, Mapping[str, Any], Curves], bool]


def write_plots(folder: Path, report: Mapping[str, Any], curves: Curves) -> list[Path]:
    """Draw every plot that the run has data for.

    Args:
        folder: where to, usually `runs/<name>/plots`.
        report: content of `report.json`.
        curves: of `metrics.jsonl`.

    Returns:
        The files written; each plot as PNG (150 dpi) and SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        if not draw(axes, report, curves):
            continue
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written


def _recovery(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    metric, points = report["metrics"]["perplexity"], report["curve"] or _curve_so_far(curves)
    if not points:
        return False
    tokens = [point["tokens"] for point in points]
    axes.plot(tokens, [point["perplexity"] for point in points], "o-", color=BLUE, label="QAT", ms=4)
    for key, label, colour, style in (
        ("ptq", "PTQ (rtn)", ORANGE, "--"),
        ("best_ptq", f"PTQ ({metric.get('best_ptq_method')})", ORANGE, ":"),
        ("full_precision", "full precision", GREEN, "--"),
        ("full_precision_tuned", "fine-tuned control", GREEN, ":"),
    ):
        value = metric.get(key)
        if value is not None and not (key == "best_ptq" and metric.get("best_ptq_method") == "rtn"):
            axes.axhline(value, color=colour, linestyle=style, label=label)
    best = report["training"].get("best_tokens")
    if best in tokens:
        axes.plot(
            best, points[tokens.index(best)]["perplexity"], "*", color=INK, ms=12, label="best checkpoint"
        )
    for index, span in enumerate(phases(report["recipe"])):
        axes.axvspan(span.start, span.end, color=GREY, alpha=0.08 + 0.08 * (index % 2), label=span.label)
    _over_tokens(axes, "held-out perplexity")
    axes.legend(frameon=False)
    return True


def _losses(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    drawn = [_line(axes, curves, "train/loss", BLUE), _line(axes, curves, "train/kl", ORANGE)]
    _over_tokens(axes, "training loss, nats per token")
    if any(drawn):
        axes.legend(frameon=False)
    return any(drawn)


def _learning_rate(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    _over_tokens(axes, "learning rate")
    return _line(axes, curves, "train/learning_rate", BLUE)


def _grad_norm(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    _over_tokens(axes, "gradient norm")
    return _line(axes, curves, "train/grad_norm", BLUE)


def _throughput(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    _over_tokens(axes, "tokens per second")
    return _line(axes, curves, "train/tokens_per_second", BLUE)


def _layers(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    layers = [layer for layer in report["layers"] if layer.get("sqnr_db") is not None]
    if not layers:
        return False
    axes.plot([layer["sqnr_db"] for layer in layers], ".", color=BLUE)
    axes.set(xlabel="linear, in the order of the model", ylabel="packed against fake-quantized, SQNR in dB")
    return True


def _grid(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    weights = (report.get("insight") or {}).get("weights")
    if not weights:
        return False
    for (model, label), colour in zip(MODELS, (GREEN, ORANGE, BLUE), strict=True):
        counts = weights[model]["fractions"]
        edges = [index / len(counts) - 0.5 for index in range(len(counts) + 1)]
        axes.stairs([count * len(counts) / sum(counts) for count in counts], edges, color=colour, label=label)
    axes.set(xlabel="steps from the nearest grid point", ylabel="density (1: chance)", ylim=(0, None))
    axes.legend(frameon=False)
    return True


def _pruning(axes: Axes, report: Mapping[str, Any], curves: Curves) -> bool:
    importance = (report.get("insight") or {}).get("importance")
    if not importance:
        return False
    for (model, label), colour in zip(MODELS, (GREEN, ORANGE, BLUE), strict=True):
        perplexities = importance[model]["perplexities"]  # fewer than shares where the model was ruined
        shares = [100 * share for share in importance["shares"][: len(perplexities)]]
        axes.plot(shares, perplexities, "o-",
                  color=colour, label=label, ms=4)  # fmt: skip
    axes.set(xlabel="MLP channels switched off, per cent", ylabel="perplexity", yscale="log")
    axes.legend(frameon=False)
    return True


PLOTS: dict[str, Draw] = {
    "recovery": _recovery,
    "loss": _losses,
    "learning_rate": _learning_rate,
    "grad_norm": _grad_norm,
    "throughput": _throughput,
    "layers": _layers,
    "weights_on_grid": _grid,
    "pruning": _pruning,
}


def _curve_so_far(curves: Curves) -> list[dict[str, float]]:
    """The recovery curve of a run whose training is not finished."""
    curve = curves.get("eval/perplexity")
    return [{"tokens": t, "perplexity": p} for t, p in zip(curve.tokens, curve.values, strict=True)]


def _line(axes: Axes, curves: Curves, name: str, colour: str) -> bool:
    curve = curves.get(name)
    if not curve.tokens:
        return False
    axes.plot(curve.tokens, curve.values, color=colour, label=name, linewidth=1.2)
    return True


def _over_tokens(axes: Axes, title: str) -> None:
    axes.set(xlabel="tokens", ylabel=title)
    axes.xaxis.set_major_formatter(EngFormatter())
