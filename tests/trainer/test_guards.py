"""NaN and collapsed scales, damaged checkpoints, early stopping, schedules and hangs, in one process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.loop.checkpoint import list_checkpoints, verify_checkpoint
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.loop.watchdog import Watchdog
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder


def trainer_for(folder: Path, *overrides: str) -> Trainer:
    recipe = load_recipe("tiny-random-w4a8", ["qat.tokens=1280", "data.evaluation_blocks=2", *overrides])
    model = load_model(recipe.model)
    prepare(model, recipe.quantization, recipe.qat.method)
    run = RunFolder(folder)
    return Trainer(
        Accelerator(cpu=True),
        recipe,
        model,
        InProcessTeacher(load_model(recipe.model)),
        load_data(recipe, load_tokenizer(recipe.model)),
        run.checkpoints,
        MetricsLog(run),
        Console(quiet=True),
    )


def events(folder: Path) -> list[str]:
    return [line["event"] for line in RunFolder(folder).read_metrics() if "event" in line]


def poison(trainer: Trainer, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradients of these calls of the step NaN, once each."""
    original, calls = trainer._step, iter(range(10_000))

    def step() -> Any:
        result = original()
        if next(calls) in steps:
            for parameter in trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
            return type(result)(result.loss, result.kl, float("nan"), result.loader_seconds)
        return result

    monkeypatch.setattr(trainer, "_step", step)


def test_a_step_with_nan_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    poison(trainer, {3}, monkeypatch)
    state = trainer.train()
    assert (state.step, state.skipped_steps, state.rollbacks) == (10, 1, 0)
    assert events(tmp_path) == ["skip"]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_three_in_a_row_go_back_to_the_checkpoint_with_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=256")
    poison(trainer, {4, 5, 6}, monkeypatch)
    state = trainer.train()
    assert (state.step, state.rollbacks, state.rate_factor) == (10, 1, 0.5)
    assert events(tmp_path) == ["skip", "skip", "skip", "rollback"]


def test_a_run_that_keeps_diverging_stops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=128", "qat.guards.max_rollbacks=1")
    poison(trainer, set(range(2, 500)), monkeypatch)
    with pytest.raises(UserError, match=r"diverged.*learning_rate"):
        trainer.train()


def test_a_collapsed_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=128")
    original, calls = trainer.optimizer.step, iter(range(100))

    def step() -> None:
        original()
        if next(calls) == 4:
            next(iter(quant_layers(trainer.model).values())).weight_scale.data.zero_()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    assert trainer.train().rollbacks == 1
    assert "scale_collapsed" in events(tmp_path)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    options = ("qat.evaluate_every_tokens=128", "qat.early_stopping=2", "qat.optimizer.learning_rate=3e-2")
    state = trainer_for(tmp_path, "qat.optimizer.schedule=constant", *options).train()
    assert state.step < 10
    assert state.best_step == min(state.curve, key=lambda point: point["perplexity"])["step"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    trainer_for(tmp_path, "qat.tokens=256").train()
    newest = list_checkpoints(RunFolder(tmp_path).checkpoints)[-1]
    verify_checkpoint(newest)
    victim = newest / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        trainer_for(tmp_path, "qat.tokens=512").train()


def test_a_progressive_schedule_ends_on_the_target_grid(tmp_path: Path) -> None:
    phases = "[{weights: {bits: 8}, fraction: 0.5}, {weights: {bits: 4}, fraction: 0.5}]"
    trainer = trainer_for(tmp_path, f"qat.schedule.phases={phases}", "qat.evaluate_every_tokens=640")
    state = trainer.train()
    assert {layer.weight_scheme.bits for layer in quant_layers(trainer.model).values()} == {4}
    assert state.phase == 1
    before, after = (point["perplexity"] for point in state.curve)
    assert before != after


def test_a_hang_names_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog(timeout=0.2, rank=3) as watchdog:
        time.sleep(0.6)
        assert watchdog.warnings >= 1
    assert "rank 3" in capsys.readouterr().err


def test_metrics_are_json_lines_under_the_agreed_names(tmp_path: Path) -> None:
    trainer_for(tmp_path, "qat.tokens=256").train()
    lines = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
    names = {"train/loss", "train/kl", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"}
    assert names < set(lines[0])
    assert "eval/perplexity" in lines[-1]
