"""A second stage for a task, and the batch size that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.pipeline import run
from qatapult.trainer.plan.batch_size import engine_of, largest_batch, resolve_batch_size
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.memory import memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.planner import usable
from qatapult.trainer.plan.settings import Setting
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe, load_recipe
from qatapult.trainer.recipe.schema import AUTO, Recipe
from qatapult.trainer.recipe.task import task_recipe
from qatapult.trainer.run_folder import RunFolder


def task_text(folder: Path) -> Path:
    file = folder / "task.jsonl"
    rows = ({"text": f"Question {i}: what is {i} and {i + 1}? Answer: {2 * i + 1}."} for i in range(200))
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def recipe_for(folder: Path, *more: str) -> Recipe:
    task = f"{{data: [{{kind: jsonl, path: {task_text(folder)}}}], tokens: 1280, learning_rate: 0.003}}"
    return load_recipe(
        "tiny-random-w4a8",
        ["export=[]", "qat.tokens=640", "data.evaluation_blocks=4", f"qat.task={task}", *more],
    )


def test_the_second_stage_learns_the_task_on_its_grid_and_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path, "qat.trainable=lora", "qat.evaluate_every_tokens=640")
    original, steps = Trainer._step, iter(range(1000))

    def dies(trainer: Trainer) -> Any:
        if next(steps) == 9:  # five steps of recovery, four of the task
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "runs", quiet=True, plots=False)
    folder = RunFolder(tmp_path / "runs" / recipe.name)
    assert (folder.artifact("qat") / "recovery.json").exists()
    assert not folder.stage("qat").exists()
    taken: list[int] = []
    monkeypatch.setattr(
        Trainer, "_step", lambda trainer: taken.append(trainer.state.step) or original(trainer)
    )
    run(recipe, tmp_path / "runs", quiet=True, plots=False)
    result = folder.read_stage("qat")
    assert len(taken) <= 10  # recovery was not trained again
    assert result["task"]["perplexity"] < 0.9 * result["task"]["perplexity_before"]
    assert result["task"]["steps"] == 10
    report = json.loads(folder.report_json.read_text())
    assert any("Second stage" in note for note in report["notes"])
    assert report["metrics"]["perplexity"]["packed"] == pytest.approx(result["perplexity"], rel=0.02)
    lines = [line for line in folder.read_metrics() if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 16))
    named = {name for line in folder.read_metrics() for name in line if name.startswith("eval/")}
    assert named == {"eval/perplexity", "eval/task_perplexity"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["qat.task={data: [{kind: jsonl, path: missing.jsonl}], tokens: 64}"], "missing.jsonl"),
        (["qat.task={data: [{kind: cpython_docs, documents: 1}], tokens: 64}"], "less than one block"),
        (["qat.distillation.cache=nowhere"], "nowhere holds no teacher cache"),
    ],
)
def test_what_a_later_stage_lacks_is_found_before_the_first(
    tmp_path: Path, changes: list[str], message: str
) -> None:
    recipe = load_recipe("tiny-random-w4a8", ["export=[]", *changes])
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "runs", quiet=True, plots=False)
    assert not (tmp_path / "runs").exists()


def test_the_second_stage_mixes_in_the_cross_entropy(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "qat.distillation.cache=somewhere", "qat.schedule.activations_start=0.5")
    assert recipe.qat.task is not None
    second = task_recipe(recipe, recipe.qat.task, weights_rate=1e-3)
    assert (second.qat.distillation.kind, second.qat.distillation.cross_entropy) == ("forward_kl", 0.5)
    assert second.qat.distillation.cache is None
    assert second.qat.schedule.activations_start == 0
    assert second.qat.optimizer.learning_rate == 0.003
    automatic = recipe.qat.task.model_copy(update={"learning_rate": "auto", "cross_entropy": 1.0})
    alone = task_recipe(recipe, automatic, weights_rate=1e-3).qat
    assert alone.distillation.kind == "none"
    assert alone.optimizer.learning_rate == pytest.approx(1e-3 / 3)


AUTOMATIC = ["qat.batch_size=auto", "qat.global_batch_tokens=4096"]


def test_auto_survives_the_recipe_file_and_needs_the_size_of_a_step(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-random-w4a8", AUTOMATIC)
    assert recipe.qat.batch_size == AUTO
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe))
    assert "batch_size: auto" in file.read_text()
    assert load_recipe(file) == recipe
    for bad in (["qat.batch_size=auto"], ["qat.batch_size=0"], ["qat.batch_size=large"]):
        with pytest.raises(UserError, match="batch_size"):
            load_recipe("tiny-random-w4a8", bad)


def test_the_largest_batch_that_fits_is_taken_and_steps_are_cut_evenly() -> None:
    recipe = load_recipe("llama-2-7b-w4a8", ["qat.batch_size=auto", "qat.global_batch_tokens=4194304"])
    shape, sizes = shape_of(recipe.model), []
    for node, engine in (("8xA100-80GB", "zero3"), ("8xA100-80GB", "fsdp2"), ("8xH200", "fsdp2")):
        cluster = parse_cluster(node)
        size = largest_batch(recipe, cluster, engine, "none")  # type: ignore[arg-type]
        blocks = 4194304 // recipe.data.block_size // cluster.world
        micro_batches = -(-blocks // size)
        assert size == -(-blocks // micro_batches)

        def needed(blocks: int, engine: str = engine, cluster: Any = cluster) -> float:
            setting = Setting(engine, "none", recipe.qat.gradient_checkpointing, blocks, "sharded")  # type: ignore[arg-type]
            return memory(recipe, shape, cluster, setting).device

        assert needed(size) <= usable(cluster.gpu)
        fewer = -(-blocks // max(1, micro_batches - 1))
        assert micro_batches == 1 or needed(fewer) > usable(cluster.gpu)
        sizes.append(size)
    assert sizes[-1] > sizes[0]


def test_a_model_that_does_not_fit_at_all_says_so() -> None:
    recipe = load_recipe("llama-2-7b-w4a8", ["qat.batch_size=auto", "qat.global_batch_tokens=4194304"])
    cluster = parse_cluster("1xA100-80GB")
    small = replace(cluster, gpu=replace(cluster.gpu, memory=2e9))
    with pytest.raises(UserError, match=r"one block of .* needs .* GB a process of 1.9"):
        largest_batch(recipe, small, "single", "none")


def test_this_machine_gives_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve_batch_size(load_recipe("tiny-random-w4a8", AUTOMATIC))
    assert recipe.qat.batch_size == 64  # a tiny model: the whole step at once
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_batch_size(load_recipe("tiny-random-w4a8", AUTOMATIC)).qat.batch_size == 16
    assert resolve_batch_size(load_recipe("tiny-random-w4a8")).qat.batch_size == 2


def test_the_launchers_engine_is_known(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert engine_of(8, deepspeed) == ("zero3", "parameters")
    assert engine_of(
        8, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    ) == ("zero1", "none")  # fmt: skip
    assert engine_of(8, {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}) == (
        "fsdp2",
        "parameters",
    )
    assert engine_of(8, {}) == ("ddp", "none")
    assert engine_of(1, {}) == ("single", "none")
