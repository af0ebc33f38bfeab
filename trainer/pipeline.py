"""A run from its recipe to its report: stages that are finished are skipped, the rest is done in order."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from accelerate.utils import gather_object

from qatapult.launch.owner import Owner, claim
from qatapult.trainer.console import Console
from qatapult.trainer.context import Context
from qatapult.trainer.data.blocks import TokenizedData, check_data, load_data
from qatapult.trainer.distill.cache import check_fits
from qatapult.trainer.environment import describe_environment
from qatapult.trainer.loop.disk_space import checkpoints_bytes, require_disk_space
from qatapult.trainer.loop.engine import choose_allocation, create_accelerator
from qatapult.trainer.loop.interrupt import INTERRUPTED, Interrupted, current_flag
from qatapult.trainer.models import check_model, empty_model, load_tokenizer
from qatapult.trainer.plan.batch_size import resolve_batch_size
from qatapult.trainer.quantize.prepare import layer_grids
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import differences, dump_recipe, load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.recipe.task import task_data, task_recipe
from qatapult.trainer.report import write_report
from qatapult.trainer.run_folder import STAGES, RunFolder, write_atomically, write_json
from qatapult.trainer.tracking.trackers import Tracking

#: Stages that all processes work on together; the others run on the main process while the rest waits.
_SHARED_STAGES = ("qat",)


def run(recipe: Recipe, runs: Path, quiet: bool = False, as_json: bool = False, plots: bool = True) -> None:
    """Do what is left of a run, and show the recovery table.

    Args:
        recipe: what to do.
        runs: folder of the runs.
        quiet: show no progress.
        as_json: print `report.json` instead of the table.
        plots: draw the report's static plots (`qatapult report RUN` draws them later).

    Raises:
        UserError: if the input is bad or the folder holds another recipe's run; nothing is written then.
    """
    folder = RunFolder(runs / recipe.name)
    data = check_inputs(recipe, folder)
    given, recipe = recipe, resolve_batch_size(recipe)
    console = Console(quiet=quiet, as_json=as_json)
    accelerator = create_accelerator(recipe)
    choose_allocation(accelerator)
    owner = claim(folder) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    try:
        tracking = Tracking(accelerator, recipe, folder)
        context = Context(recipe, folder, accelerator, console, tracking, owner)
        context.data = data
        if accelerator.is_main_process:
            write_atomically(folder.recipe, dump_recipe(given))
            write_json(folder.environment, describe_environment(accelerator, recipe.qat))
        _run_stages(context, owner)
        _finish(context, as_json, plots)
    except Interrupted:
        console.say(f"interrupted; a checkpoint is written. The same command goes on: {_command()}")
        sys.exit(INTERRUPTED)
    finally:
        if owner is not None:
            owner.release()
        accelerator.end_training()


def check_inputs(recipe: Recipe, folder: RunFolder) -> TokenizedData:
    """Refuse what cannot work, before weights are loaded or anything is written.

    Returns:
        The recipe's text, read and packed.

    Raises:
        UserError: naming the field or file and what would be right.
    """
    if folder.recipe.exists():
        changed = differences(load_recipe(folder.recipe), recipe)
        if changed:
            raise UserError(
                f"{folder.path} holds a run of another recipe ({'; '.join(changed[:3])}); "
                "choose another name=…, or remove that folder"
            )
    check_model(recipe.model)
    check_data(recipe.data)
    if recipe.qat.task is not None:
        check_data(task_data(recipe, recipe.qat.task))
    model = empty_model(recipe.model)
    layer_grids(model, recipe.quantization)
    if not folder.stage("qat").exists():
        needed = checkpoints_bytes(model, recipe.qat.checkpoints.keep)
        require_disk_space(folder.checkpoints, needed, "checkpoints (qat.checkpoints.keep is how many)")
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    distillation = recipe.qat.distillation
    if distillation.cache is not None:
        check_fits(Path(distillation.cache), data.fingerprint, distillation.temperature)
    if recipe.qat.task is not None:
        # Its length is known before the first stage has trained for hours; the tokens are cached.
        load_data(task_recipe(recipe, recipe.qat.task, weights_rate=1.0), tokenizer)
    return data


def _run_stages(context: Context, owner: Owner | None) -> None:
    for stage in STAGES:
        done, told_to_stop = _agree(context, stage)
        if done:
            context.console.stage(stage, "done before")
            continue
        if told_to_stop:
            raise Interrupted
        context.console.stage(stage)
        result = None
        if stage in _SHARED_STAGES or context.accelerator.is_main_process:
            result = importlib.import_module(f"qatapult.trainer.stages.{stage}").run(context)
        if owner is not None:
            with owner.writing():
                write_json(context.run.stage(stage), result)
        context.accelerator.wait_for_everyone()


def _agree(context: Context, stage: str) -> tuple[bool, bool]:
    """Whether a stage is done already, and whether any process was told to stop: the same answer everywhere.

    A slow process may look when the main one has just finished the stage, so only the main one's look counts.
    """
    flag = current_flag()
    mine = [context.run.stage(stage).exists(), flag is not None and flag.received is not None]
    everyone = gather_object([mine])
    return everyone[0][0], any(told for _, told in everyone)


def _finish(context: Context, as_json: bool, plots: bool) -> None:
    if not context.accelerator.is_main_process:
        return
    # Written once more, now that the report stage's own cost is known.
    page = write_report(context.run, plots)
    report = json.loads(context.run.report_json.read_text(encoding="utf-8"))
    context.tracking.finish(report)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    context.console.table(report)
    context.console.say(f"report: {page}")
    for name in context.recipe.export:
        context.console.say(f"{name}: {context.run.export(name)}")


def _command() -> str:
    return " ".join(["qatapult", *sys.argv[1:]])
