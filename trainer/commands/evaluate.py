"""`qatapult evaluate`: measure a model of a run, or of any checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatapult.trainer.commands.recipe import QuietOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qatapult.trainer.evaluate.models import Models


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or a Hugging Face model folder.")],
    model: Annotated[
        str, typer.Option(help="Which of a run's models: full_precision, ptq, qat or packed.")
    ] = "packed",
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks, separated by commas: names, or folders with task YAML."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task.")] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples in the prompt of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    window: Annotated[
        int | None, typer.Option(help="Also the perplexity with a sliding window of so many tokens.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Its stride; half the window by default.")] = None,
    perplexity: Annotated[bool, typer.Option(help="Measure held-out perplexity.")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder in which lm-eval keeps answers between calls.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for lm-eval's result files.")] = None,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model: held-out perplexity, lm-eval tasks, and which kernels really ran.

    Tasks that need no network: cpython_cloze, cpython_choice, cpython_text.

    Example: qatapult evaluate runs/smollm2-135m-w4a8 --model packed --tasks cpython_cloze --limit 40
    """
    from qatapult.trainer.console import Console
    from qatapult.trainer.evaluate.kernels import counting
    from qatapult.trainer.evaluate.models import open_models
    from qatapult.trainer.evaluate.tasks import TaskOptions, find_tasks, run_tasks
    from qatapult.trainer.recipe.errors import UserError

    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    step = stride if stride is not None else (window or 2) // 2
    if window is not None and not 1 <= step < window:
        raise UserError(f"--stride {step} must be at least 1 and below --window {window}")
    models = open_models(folder)
    if names:
        find_tasks(names)
    loaded = models.load(model)
    console = Console(quiet=quiet, as_json=as_json)
    options = TaskOptions(
        limit=limit,
        batch_size=batch_size,
        few_shot=few_shot,
        output=output,
        cache=None if cache is None else cache / f"{models.name}-{model}",
        name=f"{models.name}-{model}",
    )
    result: dict[str, Any] = {"folder": str(folder), "model": model}
    with counting(loaded) as kernels:
        if perplexity:
            result |= _perplexity(models, loaded, console)
        if window is not None:
            result["sliding_perplexity"] = _sliding(models, loaded, window, step, console)
        if names:
            console.say(f"tasks    {', '.join(names)}" + (f", {limit} documents each" if limit else ""))
        result["tasks"] = run_tasks(loaded, models.tokenizer, names, options)
    if kernels["linears"]:
        result["kernels"] = kernels
    typer.echo(json.dumps(result, indent=2) if as_json else describe(result))


def describe(result: dict[str, Any]) -> str:
    """The figures for a terminal, one a line."""
    lines = [f"{result['folder']}: {result['model']}"]
    for key, title in (("perplexity", "perplexity"), ("sliding_perplexity", "perplexity, sliding window")):
        if key in result:
            lines.append(f"  {title:<28} {result[key]:.4f}")
    for task, score in result["tasks"].items():
        for metric, value in score["metrics"].items():
            error = score["standard_error"] if metric == score["metric"] else None
            spread = f" ± {error:.4f}" if error is not None else ""
            lines.append(f"  {task + ', ' + metric:<28} {value:.4f}{spread}")
    if "kernels" in result:
        kernels = result["kernels"]
        ran = ", ".join(
            f"{count} of {kernels['linears']} linears ran {kind}"
            for kind, count in kernels["by_kind"].items()
        )
        lines.append(f"  {ran or 'no packed linear ran'}")
    return "\n".join(lines)


def _perplexity(models: Models, loaded: PreTrainedModel, console: Any) -> dict[str, Any]:
    from qatapult.trainer.evaluate.perplexity import perplexity

    data = models.data
    with console.progress(data.held_out.numel(), "held-out") as meter:
        measured = perplexity(loaded, data.held_out, data.held_out_documents, on_progress=meter.update)
    return {"perplexity": measured.value, "tokens": measured.tokens}


def _sliding(models: Models, loaded: PreTrainedModel, window: int, stride: int, console: Any) -> float:
    from qatapult.trainer.evaluate.sliding import sliding_perplexity

    tokens = models.data.held_out.flatten()
    with console.progress(len(tokens), "sliding") as meter:
        return sliding_perplexity(loaded, tokens, window, stride, on_progress=meter.update)
