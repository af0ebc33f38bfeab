"""NaN and collapsed scales, damaged checkpoints, early stopping, schedules and hangs, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qatapult.trainer.loop.checkpoint import list_checkpoints, verify_checkpoint
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.loop.watchdog import Pulse, Watchdog, describe, split
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import RunFolder

TrainerFor = Callable[..., Trainer]


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


def test_a_step_with_nan_is_left_out(
    tmp_path: Path, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    poison(trainer, {3}, monkeypatch)
    state = trainer.train()
    assert (state.step, state.skipped_steps, state.rollbacks) == (10, 1, 0)
    assert events(tmp_path) == ["skip"]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_three_in_a_row_go_back_to_the_checkpoint_with_a_lower_rate(
    tmp_path: Path, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=256")
    poison(trainer, {4, 5, 6}, monkeypatch)
    state = trainer.train()
    assert (state.step, state.rollbacks, state.rate_factor) == (10, 1, 0.5)
    assert events(tmp_path) == ["skip", "skip", "skip", "rollback"]


def test_a_run_that_keeps_diverging_stops_and_says_so(
    tmp_path: Path, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=128", "qat.guards.max_rollbacks=1")
    poison(trainer, set(range(2, 500)), monkeypatch)
    with pytest.raises(UserError, match=r"diverged.*learning_rate"):
        trainer.train()


def test_a_collapsed_scale_is_caught(
    tmp_path: Path, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path, "qat.checkpoints.every_tokens=128")
    original, calls = trainer.optimizer.step, iter(range(100))

    def step() -> None:
        original()
        if next(calls) == 4:
            next(iter(quant_layers(trainer.model).values())).weight_scale.data.zero_()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    assert trainer.train().rollbacks == 1
    assert "scale_collapsed" in events(tmp_path)


def test_early_stopping_keeps_the_best(tmp_path: Path, trainer_for: TrainerFor) -> None:
    options = ("qat.evaluate_every_tokens=128", "qat.early_stopping=2", "qat.optimizer.learning_rate=3e-2")
    state = trainer_for(tmp_path, "qat.optimizer.schedule=constant", *options).train()
    assert state.step < 10
    assert state.best_step == min(state.curve, key=lambda point: point["perplexity"])["step"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path, trainer_for: TrainerFor) -> None:
    trainer_for(tmp_path, "qat.tokens=256").train()
    newest = list_checkpoints(RunFolder(tmp_path).checkpoints)[-1]
    verify_checkpoint(newest)
    victim = newest / "weights-0.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=r"weights-0\.safetensors is damaged"):
        trainer_for(tmp_path, "qat.tokens=512").train()


def test_a_progressive_schedule_ends_on_the_target_grid(tmp_path: Path, trainer_for: TrainerFor) -> None:
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


def test_the_rank_that_passed_the_fewest_places_is_named() -> None:
    pulses = [Pulse(rank, "node1", 40 - 3 * (rank == 2), f"place {rank}") for rank in range(4)]
    behind, others = split(pulses)
    said = describe(behind, others, 61.0)
    assert said.startswith("rank 2 on node1 hangs or falls behind, at place 2; 3 others wait, at place 0")
    assert "61 s (qat.guards.hang_timeout)" in said


def test_out_of_memory_names_the_plan_and_three_settings(
    tmp_path: Path, trainer_for: TrainerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)

    def step() -> Any:
        return torch.empty(2**60)

    monkeypatch.setattr(trainer, "_step", step)
    with pytest.raises(UserError) as caught:
        trainer.train()
    said = str(caught.value)
    assert "rank 0 is out of memory" in said
    assert "single needs about" in said
    for setting in ("qat.gradient_checkpointing=true", "qat.batch_size=1", "fsdp2 or zero3", "qatapult plan"):
        assert setting in said
    assert "\n" not in said


def test_metrics_are_json_lines_under_the_agreed_names(tmp_path: Path, trainer_for: TrainerFor) -> None:
    trainer_for(tmp_path, "qat.tokens=256").train()
    lines = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
    names = {"train/loss", "train/kl", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"}
    assert names < set(lines[0])
    assert "eval/perplexity" in lines[-1]
