"""A plan as a table for people, as JSON for programs, and as a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qatapult.trainer.plan.accelerate_config import recipe_overrides
from qatapult.trainer.plan.planner import Candidate, Plan, usable
from qatapult.trainer.plan.settings import step_tokens
from qatapult.trainer.report.text import dollars

GB = 1e9
_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "teacher": "teacher",
    "quantized_weights": "quant.",
    "activations": "activ.",
    "loss": "loss",
    "communication": "comm.",
    "runtime": "runtime",
}


def plan_json(plan: Plan, everything: bool = False) -> dict[str, Any]:
    """The plan in plain types. Bytes, seconds, hours, US dollars."""
    recommended = plan.recommended
    cluster = plan.cluster
    return {
        "recipe": plan.recipe.name,
        "model": {"source": plan.recipe.model.source, "parameters": plan.shape.parameters}
        | asdict(plan.shape),
        "cluster": {
            "gpu": cluster.gpu.name,
            "gpus_per_node": cluster.gpus,
            "nodes": cluster.nodes,
            "price_per_gpu_hour": cluster.price,
            "price_is_default": cluster.price_is_default,
            "memory_bytes_usable": usable(cluster.gpu),
        },
        "tokens": plan.recipe.qat.tokens,
        "tokens_per_step": step_tokens(plan.recipe, cluster),
        "recommended": recommended.as_json() if recommended else None,
        "recipe_overrides": recipe_overrides(recommended.setting) if recommended else [],
        "candidates": [c.as_json() for c in (plan.candidates if everything else plan.best_per_engine())],
        "assumptions": asdict(plan.assumptions) | asdict(plan.speed),
    }


def print_plan(plan: Plan, console: Console, everything: bool = False) -> None:
    """Print the table, the recommendation and the assumptions."""
    cluster, shape = plan.cluster, plan.shape
    steps = plan.recipe.qat.tokens / step_tokens(plan.recipe, cluster)
    price = f"${cluster.price:.2f} a GPU-hour" + (
        " (default: give yours with --price)" * (cluster.price_is_default and not cluster.gpu.is_cpu)
    )
    console.print(
        f"{plan.recipe.name}: {plan.recipe.model.source}, {shape.parameters / 1e9:.3g} B weights, on "
        f"{cluster.describe()} ({usable(cluster.gpu) / GB:.1f} GB a GPU may be filled)\n"
        f"{plan.recipe.qat.tokens:,} tokens = {steps:,.0f} steps of "
        f"{step_tokens(plan.recipe, cluster):,}; {price}",
        highlight=False,
    )
    console.print(_table(list(plan.candidates) if everything else plan.best_per_engine(), plan))
    _print_recommendation(plan, console)
    given = asdict(plan.assumptions) | asdict(plan.speed)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in given.items())
    console.print(f"Assumptions: {shown}.", style="dim", highlight=False)


def plot_plan(plan: Plan, path: Path) -> None:
    """Stacked bars of a rank's memory by part, each engine's best setting, and the GPU's limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = plan.best_per_engine()
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(chosen) + 1.6), layout="constrained")
    left = [0.0] * len(chosen)
    labels = [f"{c.setting.name}, {c.setting.teacher}, {c.setting.micro_batch} blocks" for c in chosen]
    for part, label in _PARTS.items():
        values = [candidate.memory.parts[part] / GB for candidate in chosen]
        axes.barh(labels, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    limit = usable(plan.cluster.gpu) / GB
    axes.axvline(limit, color="black", linestyle="--", label="limit")
    axes.set_xlim(0, min(max(left), 2.5 * limit) * 1.02)
    axes.invert_yaxis()
    axes.set_xlabel("GB a GPU")
    axes.legend(ncols=5, fontsize="small", loc="upper center", bbox_to_anchor=(0.4, -0.12))
    axes.set_title(f"{plan.recipe.model.source} on {plan.cluster.describe()}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _table(candidates: list[Candidate], plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("engine", no_wrap=True)
    for name in ("teacher", "recompute", "batch"):
        table.add_column(name)
    for name in ("GB", *(_PARTS.values()), "s/step", "tokens/s", "hours", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    recommended = plan.recommended
    for candidate in candidates:
        setting = candidate.setting
        table.add_row(
            ("* " if candidate is recommended else "  ") + setting.name,
            setting.teacher,
            "yes" if setting.checkpointing else "no",
            str(setting.micro_batch),
            f"{candidate.memory.device / GB:.1f}",
            *(f"{candidate.memory.parts[part] / GB:.1f}" for part in _PARTS),
            f"{candidate.step.seconds:.3g}",
            f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.hours:.2f}" if candidate.hours < 100 else f"{candidate.hours:,.0f}",
            dollars(candidate.cost),
            "yes" if candidate.fits else f"no: {candidate.why_not}",
            style="bold" if candidate is recommended else ("" if candidate.fits else "dim"),
        )
    return table


def _print_recommendation(plan: Plan, console: Console) -> None:
    best = plan.recommended
    if best is None:
        return
    checkpointing = "with" if best.setting.checkpointing else "without"
    console.print(
        f"Recommended: {best.setting.name}, {checkpointing} gradient checkpointing, "
        f"{best.setting.micro_batch} blocks a process, teacher {best.setting.teacher}: "
        f"{best.hours:.1f} hours, {dollars(best.cost)}.\n"
        f"In the recipe: {' '.join(recipe_overrides(best.setting))}",
        highlight=False,
    )
    world, block = plan.cluster.world, plan.recipe.data.block_size
    asked = plan.recipe.qat.global_batch_tokens or plan.recipe.qat.batch_size * block
    if asked < world * block:
        console.print(
            f"Note: the recipe's step of {asked:,} tokens is less than a block a process; "
            f"planned with {world * block:,}.",
            highlight=False,
        )
