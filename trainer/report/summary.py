"""`report.json`: everything a run found out, gathered from its stages. Works on unfinished runs too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qatapult.trainer.report.recovery import Losses, Recovery, perplexity_recovery, recovery, task_recovery
from qatapult.trainer.report.text import number, percent
from qatapult.trainer.run_folder import STAGES, RunFolder

#: Stages in which text was generated, with the name that the report gives them.
SAMPLED = (("baseline", "full_precision"), ("ptq", "ptq"), ("qat", "qat"), ("packed", "packed"))

Stage = Mapping[str, Any]


def summarize(run: RunFolder) -> dict[str, Any]:
    """Build the content of `report.json` from `stages/*.json`, the recipe and the environment.

    Stages that are not finished leave their fields null, so the same function serves a run that is under way.
    """
    stages = {name: run.read_stage(name) for name in STAGES if run.stage(name).exists()}
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.exists() else {}
    environment = _json(run.environment)
    report = summarize_stages(run.name, stages, recipe, environment)
    insight = _json(run.path / "insight.json")
    report["insight"] = insight or None
    return report


# From here on a report says so: the GPU could have done that much more.
_SLOW_LOADER = 0.02


def summarize_stages(
    name: str, stages: Mapping[str, Stage], recipe: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the content of `report.json` from the results of the stages."""
    packed, qat = stages.get("packed", {}), stages.get("qat", {})
    format_name = describe_format(recipe.get("quantization", {}))
    metrics = _metrics(stages, int(recipe.get("evaluation", {}).get("bootstrap", 1000)))
    parity = dict(packed.get("parity") or {})
    layers = _layers(parity.pop("layers", []), stages)
    return {
        "name": name,
        "headline": headline(metrics.get("perplexity", {}), format_name, stages),
        "format": format_name,
        "finished": [stage for stage in STAGES if stage in stages],
        "metrics": metrics,
        "notes": _notes(metrics.get("perplexity", {}), qat),
        "curve": qat.get("curve", []),
        "training": {
            key: qat[key]
            for key in (
                "steps",
                "tokens",
                "best_step",
                "best_tokens",
                "stopped_early",
                "skipped_steps",
                "rollbacks",
                "loader_share",
                "task",
            )
            if key in qat
        },
        "cost": {stage: result["cost"] for stage, result in stages.items() if result.get("cost")},
        "bytes": packed.get("bytes"),
        "parity": parity,
        "kernels": packed.get("kernels", {}),
        "layers": layers,
        "samples": _samples(stages),
        "export": stages.get("export", {}).get("formats", {}),
        "recipe": recipe,
        "environment": environment,
    }


def describe_format(quantization: Mapping[str, Any]) -> str:
    """Short name of a grid: `W4A8 channel`, `W4A16 g64`, `W2A8 g64 + 30 overrides`."""
    weights, activations = quantization.get("weights"), quantization.get("activations")
    if not weights:
        where = ""
    elif weights.get("granularity") == "group":
        where = f"g{weights['group_size']}"
    else:
        where = weights.get("granularity", "channel")
    overrides = len(quantization.get("overrides") or ())
    parts = [
        f"W{_bits(weights)}A{_bits(activations)}",
        where,
        f"+ {overrides} overrides" if overrides else "",
    ]
    return " ".join(part for part in parts if part)


def headline(metric: Mapping[str, Any], format_name: str, stages: Mapping[str, Stage] | None = None) -> str:
    """The run in one sentence, as far as it got."""
    full, ptq, packed, qat = (metric.get(key) for key in ("full_precision", "ptq", "packed", "qat"))
    if full is None:
        return f"{format_name}: nothing has been measured yet"
    if ptq is None:
        return f"{format_name}: perplexity {number(full)} at full precision; quantization is still to come"
    came_to = packed if packed is not None else qat
    if came_to is None:
        return f"{format_name} costs: perplexity {number(full)} → {number(ptq)}; training is still to come"
    figures = f"perplexity {number(ptq)} → {number(came_to)} against {number(full)} at full precision"
    share = metric.get("recovery") if packed is not None else metric.get("recovery_fake_quantized")
    proof = "" if packed is not None else " (not yet proven on packed integers)"
    if share is None:
        return f"{format_name} costs nothing on this text: {figures}{proof}"
    if share < 0:
        return f"Training made {format_name} worse: {figures}{proof}"
    return f"{percent(share)} of what {format_name} cost came back: {figures}{proof}"


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _layers(parity: list[dict[str, Any]], stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Layers of the packed model: parity, mean scale, rounding errors of PTQ and after training."""
    before = stages.get("ptq", {}).get("methods", {}).get("rtn", {}).get("rounding") or {}
    after = stages.get("packed", {}).get("rounding") or {}
    return [
        {
            **layer,
            "scale": after.get(layer["name"], {}).get("scale"),
            "error_before": before.get(layer["name"], {}).get("error"),
            "error_after": after.get(layer["name"], {}).get("error"),
        }
        for layer in parity
    ]


def _metrics(stages: Mapping[str, Stage], resamples: int) -> dict[str, dict[str, Any]]:
    result = {"perplexity": _perplexity(stages, resamples)}
    tasks = stages.get("baseline", {}).get("tasks") or {}
    result.update({task: _task(task, stages, resamples) for task in tasks})
    return result


def _perplexity(stages: Mapping[str, Stage], resamples: int) -> dict[str, Any]:
    baseline, packed, qat = (stages.get(stage, {}) for stage in ("baseline", "packed", "qat"))
    methods: Mapping[str, Stage] = stages.get("ptq", {}).get("methods", {})
    best = min(methods, key=lambda method: methods[method]["perplexity"], default=None)
    rtn, strongest = methods.get("rtn", {}), methods.get(best or "", {})
    control = qat.get("control") or {}

    def against(quantized: Stage, trained: Stage, reference: Stage) -> Recovery:
        return _recovery_of(reference, quantized, trained, resamples)

    from_rtn, from_best = against(rtn, packed, baseline), against(strongest, packed, baseline)
    of_tuned = against(rtn, packed, control)
    return {
        "higher_is_better": False,
        "full_precision": baseline.get("perplexity"),
        "full_precision_tuned": control.get("perplexity"),
        "ptq": rtn.get("perplexity"),
        "ptq_methods": {method: result["perplexity"] for method, result in methods.items()},
        "best_ptq": strongest.get("perplexity"),
        "best_ptq_method": best,
        "qat": qat.get("perplexity"),
        "packed": packed.get("perplexity"),
        "recovery": from_rtn.value,
        "recovery_interval": _list(from_rtn.interval),
        "recovery_log": from_rtn.log,
        "recovery_log_interval": _list(from_rtn.log_interval),
        "recovery_from_best_ptq": from_best.value,
        "recovery_from_best_ptq_interval": _list(from_best.interval),
        "recovery_against_tuned": of_tuned.value,
        "recovery_against_tuned_interval": _list(of_tuned.interval),
        "recovery_fake_quantized": against(rtn, qat, baseline).value,
        "documents": len(baseline.get("losses") or ()) or None,
    }


def _recovery_of(reference: Stage, quantized: Stage, trained: Stage, resamples: int) -> Recovery:
    """Recovery of perplexity, with an interval where the losses of each document are known."""
    if any(part.get("perplexity") is None for part in (reference, quantized, trained)):
        return Recovery(None)
    losses: list[Losses] = [part.get("losses") or () for part in (reference, quantized, trained)]
    if all(losses):
        return perplexity_recovery(*losses, resamples=resamples)  # type: ignore[misc, arg-type]
    return Recovery(recovery(reference["perplexity"], quantized["perplexity"], trained["perplexity"]))


def _task(task: str, stages: Mapping[str, Stage], resamples: int) -> dict[str, Any]:
    methods: Mapping[str, Stage] = stages.get("ptq", {}).get("methods", {})
    scores = {
        "full_precision": stages["baseline"]["tasks"][task],
        "ptq": (methods.get("rtn", {}).get("tasks") or {}).get(task),
        "qat": (stages.get("qat", {}).get("tasks") or {}).get(task),
        "packed": (stages.get("packed", {}).get("tasks") or {}).get(task),
    }
    higher = bool(scores["full_precision"].get("higher_is_better", True))
    of_methods = {
        method: result["tasks"][task]
        for method, result in methods.items()
        if task in (result.get("tasks") or {})
    }
    pick = max if higher else min
    best = pick(of_methods, key=lambda method: of_methods[method]["value"], default=None)
    from_rtn = _task_recovery_of(scores["full_precision"], scores["ptq"], scores["packed"], resamples)
    from_best = _task_recovery_of(
        scores["full_precision"], of_methods[best] if best else None, scores["packed"], resamples
    )
    return {
        "higher_is_better": higher,
        **{key: score["value"] if score else None for key, score in scores.items()},
        "standard_errors": {key: score.get("standard_error") for key, score in scores.items() if score},
        "ptq_methods": {method: score["value"] for method, score in of_methods.items()},
        "best_ptq": of_methods[best]["value"] if best else None,
        "best_ptq_method": best,
        "recovery": from_rtn.value,
        "recovery_interval": _list(from_rtn.interval),
        "recovery_from_best_ptq": from_best.value,
        "recovery_from_best_ptq_interval": _list(from_best.interval),
    }


def _task_recovery_of(
    reference: dict[str, Any],
    quantized: dict[str, Any] | None,
    trained: dict[str, Any] | None,
    resamples: int,
) -> Recovery:
    if quantized is None or trained is None:
        return Recovery(None)
    return task_recovery(reference, quantized, trained, resamples=resamples)


def _notes(metric: Mapping[str, Any], qat: Stage) -> list[str]:
    """What a reader must know so that the headline does not mislead."""
    notes = []
    best, method, ptq = metric.get("best_ptq"), metric.get("best_ptq_method"), metric.get("ptq")
    if best is not None and ptq is not None and method != "rtn":
        share = metric.get("recovery_from_best_ptq")
        came_back = f"; training won back {percent(share)} of what that left" if share is not None else ""
        notes.append(f"The best PTQ is {method} with {number(best)}{came_back}.")
    tuned, full = metric.get("full_precision_tuned"), metric.get("full_precision")
    if tuned is not None and full is not None:
        share = percent(metric.get("recovery_against_tuned"))
        notes.append(
            f"Control: fine-tuned on the same tokens, full precision goes {number(full)} → {number(tuned)}; "
            f"against that reference {share} came back."
        )
    if metric.get("recovery") is not None and metric.get("recovery_interval") is None:
        notes.append("No interval: too few held-out documents to tell the cost of quantization from zero.")
    if qat.get("stopped_early"):
        notes.append("Training stopped early: the held-out perplexity had stopped falling.")
    if qat.get("rollbacks"):
        notes.append(f"Training rolled back {qat['rollbacks']} times after steps with NaN or inf.")
    if qat.get("task"):
        task = qat["task"]
        notes.append(
            f"Second stage: {task['tokens']:,} tokens for the task took its held-out perplexity from "
            f"{number(task['perplexity_before'])} to {number(task['perplexity'])}; on the general text it went from "
            f"{number(task['recovered_perplexity'])} to {number(qat['perplexity'])}."
        )
    if qat.get("loader_share", 0) > _SLOW_LOADER:
        notes.append(
            f"Steps waited for data in {percent(qat['loader_share'])} of their time: see data.md, Speed."
        )
    return notes


def _samples(stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Generated text side by side: one entry a prompt, `{"prompt", "full_precision", "ptq", …}`."""
    by_prompt: dict[str, dict[str, Any]] = {}
    written = [(key, stages.get(stage, {}).get("samples")) for stage, key in SAMPLED]
    methods: Mapping[str, Stage] = stages.get("ptq", {}).get("methods", {})
    best = min(methods, key=lambda method: methods[method]["perplexity"], default="rtn")
    if best != "rtn":
        written.append(("best_ptq", methods[best].get("samples")))
    for key, samples in written:
        for sample in samples or []:
            by_prompt.setdefault(sample["prompt"], {"prompt": sample["prompt"]})[key] = sample["text"]
    return list(by_prompt.values())


def _bits(scheme: Mapping[str, Any] | None) -> str:
    return f"{scheme['bits']:g}" if scheme else "16"


def _list(bounds: tuple[float, float] | None) -> list[float] | None:
    return list(bounds) if bounds else None


def slug(text: str) -> str:
    """A name fit for files and HTML ids."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
