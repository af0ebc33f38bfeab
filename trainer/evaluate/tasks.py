"""lm-eval tasks on a model in memory: the offline ones that come along, folders of YAML, or by name."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatapult.trainer.recipe.errors import UserError

# The figure that stands for a task, where lm-eval reports several.
_MAIN_METRICS = ("acc", "exact_match", "word_perplexity", "perplexity")


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Attributes:
        limit: documents a task; all if absent.
        batch_size: requests at a time.
        cache: SQLite file in which lm-eval keeps answers; it must not be shared between models.
        few_shot: examples in the prompt; each task's own number if absent.
        output: folder for lm-eval's result files.
        name: names the model in them.
    """

    limit: int | None = None
    batch_size: int = 8
    cache: Path | None = None
    few_shot: int | None = None
    output: Path | None = None
    name: str = "model"


def shipped_tasks() -> list[str]:
    """Names of the tasks that need no network."""
    folder = files("qatapult.configs") / "tasks"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    options: TaskOptions = TaskOptions(),
) -> dict[str, dict[str, Any]]:
    """Measure tasks.

    Args:
        model: a causal language model, packed or not, on its device.
        tokenizer: its tokenizer.
        tasks: names, or folders with task YAML (every task in the folder).
        options: limits, caching and result files.

    Returns:
        For each task `{"value", "standard_error", "higher_is_better", "metric", "metrics", "documents"}`: the
        main metric, all of lm-eval's metrics by name, and each document's score where the main one is a mean.

    Raises:
        UserError: if lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    if not tasks:
        return {}
    with _quiet():
        manager, names = find_tasks(tasks)
        results = _evaluate(model, tokenizer, manager, names, options)
    return {name: _score(name, results) for name in results["results"] if name in results["n-samples"]}


def find_tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks asked for.

    Raises:
        UserError: if lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("tasks need lm-eval: pip install 'qatapult[lm-eval]'") from None
    shipped = str(files("qatapult.configs") / "tasks")
    folders = [task for task in tasks if Path(task).is_dir()]
    own = TaskManager(include_path=[shipped, *folders], include_defaults=False)
    in_folders = TaskManager(include_path=folders, include_defaults=False).all_subtasks if folders else []
    names = [*(task for task in tasks if task not in folders), *in_folders]
    for name in names:
        if name not in own.all_tasks and (near := difflib.get_close_matches(name, shipped_tasks(), 1, 0.85)):
            raise UserError(f"evaluation.tasks: there is no task {name!r}; did you mean {near[0]!r}?")
    # Reading the thousands of tasks that come with lm-eval takes ten seconds: only where one is asked for.
    manager = (
        own if all(name in own.all_tasks for name in names) else TaskManager(include_path=[shipped, *folders])
    )
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"offline are {', '.join(shipped_tasks())}"
            raise UserError(f"evaluation.tasks: lm-eval knows no task {name!r}; {hint}")
    return manager, names


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    names: list[str],
    options: TaskOptions,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from qatapult.trainer.evaluate.lm_eval_model import QatapultLM

    tracker = _tracker(options)
    try:
        results = simple_evaluate(
            model=QatapultLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=names,
            num_fewshot=options.few_shot,
            limit=options.limit,
            use_cache=None if options.cache is None else str(options.cache),
            task_manager=manager,
            evaluation_tracker=tracker,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(f"evaluation.tasks: the data of {', '.join(names)} cannot be had: {first}") from None
    assert results is not None
    if tracker is not None:
        tracker.general_config_tracker.model_name_sanitized = options.name
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
        results["samples"] = samples
    return results


def _tracker(options: TaskOptions) -> Any:
    if options.output is None:
        return None
    from lm_eval.loggers import EvaluationTracker

    return EvaluationTracker(output_path=str(options.output))


def _score(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """The main metric of a task, with lm-eval's standard error and each document's score."""
    figures = {
        key: value for key, value in results["results"][name].items() if isinstance(value, int | float)
    }
    metrics = {key.partition(",")[0]: value for key, value in figures.items() if "_stderr" not in key}
    metrics.pop("sample_len", None)
    errors = {key.partition(",")[0]: value for key, value in figures.items() if "_stderr" in key}
    metric = next((m for m in _MAIN_METRICS if m in metrics), next(iter(metrics)))
    error = errors.get(f"{metric}_stderr")
    documents = [sample[metric] for sample in results["samples"].get(name, ()) if metric in sample]
    averaged = all(isinstance(score, int | float) for score in documents) and documents
    return {
        "value": metrics[metric],
        "standard_error": error if error is not None and math.isfinite(error) else None,
        "higher_is_better": bool(results["higher_is_better"].get(name, {}).get(metric, True)),
        "metric": metric,
        "metrics": metrics,
        "documents": documents if averaged and metric in ("acc", "exact_match") else None,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log, bars and prints out of the terminal, where results go."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
