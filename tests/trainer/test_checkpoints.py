"""What is in a checkpoint, that it is whole or not there, and the commands that look at it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.loop import checkpoint_writer
from qatapult.trainer.loop.checkpoint import list_checkpoints, read_weights
from qatapult.trainer.loop.checkpoint_writer import CheckpointWriter, Contents
from qatapult.trainer.loop.fragments import Fragment, StoredTensors, write_fragments
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.loop.training_state import random_states, set_random_states
from qatapult.trainer.pipeline import check_inputs
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe, load_recipe
from qatapult.trainer.run_folder import RunFolder

TrainerFor = Callable[..., Trainer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_any_range_comes_out_of_any_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = (torch.randn(5, 7) * 3).to(dtype)
    cuts = [0, 3, 3, 20, 35]
    for index, (first, last) in enumerate(itertools.pairwise(cuts)):
        piece = Fragment("weight", (5, 7), first, whole.view(-1)[first:last])
        odd = Fragment("odd", (3,), 0, torch.ones(3, dtype=torch.int8))
        write_fragments(tmp_path / f"{index}.safetensors", [odd, piece])
    stored = StoredTensors(sorted(tmp_path.iterdir()))
    assert torch.equal(stored.whole("weight"), whole)
    wanted = torch.empty(20, dtype=dtype)
    stored.read_into(Fragment("weight", (5, 7), 11, wanted))
    assert torch.equal(wanted, whole.view(-1)[11:31])


def test_missing_ranges_and_other_shapes_are_refused(tmp_path: Path) -> None:
    write_fragments(tmp_path / "0.safetensors", [Fragment("weight", (4,), 0, torch.ones(2))])
    stored = StoredTensors([tmp_path / "0.safetensors"])
    with pytest.raises(UserError, match="only 2 of 4 values of weight"):
        stored.whole("weight")
    with pytest.raises(UserError, match="another model or recipe"):
        stored.read_into(Fragment("weight", (2, 2), 0, torch.ones(4)))


def test_replicas_write_equal_parts_that_cover_the_tensor() -> None:
    values = torch.arange(10)
    shares = [Fragment("weight", (10,), 0, values, (index, 3)).share() for index in range(3)]
    assert torch.equal(torch.cat([share.values for share in shares]), values)
    assert [share.start for share in shares] == [0, 3, 6]


def test_random_states_survive_json() -> None:
    states = json.loads(json.dumps(random_states()))
    expected = torch.rand(4)
    set_random_states(states)
    assert torch.equal(torch.rand(4), expected)


def test_written_meanwhile_or_at_once_it_is_the_same_checkpoint(
    tmp_path: Path, trainer_for: TrainerFor
) -> None:
    """A thread writes from a copy: the steps that follow must not be seen in it."""
    options = ("qat.tokens=768", "qat.checkpoints.every_tokens=128", "qat.checkpoints.keep=9")
    contents = []
    for asynchronous in ("false", "true"):
        folder = tmp_path / asynchronous
        trainer_for(folder, *options, f"qat.checkpoints.asynchronous={asynchronous}").train()
        found = list_checkpoints(RunFolder(folder).checkpoints)
        contents.append([json.loads((path / "manifest.json").read_text())["files"] for path in found])
        assert not list(RunFolder(folder).checkpoints.glob(".*"))
    at_once, meanwhile = contents
    assert len(at_once) == 6
    for one, other in zip(at_once, meanwhile, strict=True):
        tensors = {name for name in one if name.endswith(".safetensors")}
        assert tensors == {"weights-0.safetensors", "optimizer-0.safetensors"}
        assert {name: one[name] for name in tensors} == {name: other[name] for name in tensors}


def test_what_an_attempt_left_half_written_is_cleared_away(tmp_path: Path, trainer_for: TrainerFor) -> None:
    leftover = RunFolder(tmp_path).checkpoints / ".step-3.building"
    leftover.mkdir(parents=True)
    trainer_for(tmp_path, "qat.tokens=128").train()
    assert not leftover.exists()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_earlier_checkpoints_and_names_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    writer = CheckpointWriter(Accelerator(cpu=True), asynchronous)
    contents = Contents({"weights-0.safetensors": [Fragment("w", (2,), 0, torch.ones(2))]}, {}, {"step": 1})
    whole: list[str] = []
    writer.write(tmp_path / "step-1", contents, lambda: whole.append("step-1"))
    writer.finish()

    def full(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_fragments", full)

    def write() -> None:
        writer.write(tmp_path / "step-2", contents, lambda: whole.append("step-2"))
        writer.finish()

    with pytest.raises(UserError, match=r"step-2 could not be written: rank 0: .*No space left on device"):
        write()
    assert whole == ["step-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]


@pytest.fixture(scope="module")
def run_with_checkpoints(tmp_path_factory: pytest.TempPathFactory, trainer_for: TrainerFor) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    options = ("qat.tokens=512", "qat.evaluate_every_tokens=256")
    trainer_for(run.path, *options).train()
    run.recipe.write_text(dump_recipe(load_recipe("tiny-random-w4a8", list(options))))
    return run


def test_ls_names_what_there_is(run_with_checkpoints: RunFolder) -> None:
    said = CliRunner().invoke(app, ["checkpoint", "ls", str(run_with_checkpoints.path), "--json"])
    rows = json.loads(said.stdout)
    assert [row["name"] for row in rows] == ["step-2", "step-4"]
    assert [row["tokens"] for row in rows] == [256, 512]
    assert sum(row["best"] for row in rows) == 1
    assert all(row["perplexity"] > 1 and row["processes"] == 1 for row in rows)
    table = CliRunner().invoke(app, ["checkpoint", "ls", str(run_with_checkpoints.path)])
    assert "step-4" in table.stdout


def test_verify_finds_one_changed_bit(run_with_checkpoints: RunFolder) -> None:
    arguments = ["checkpoint", "verify", str(run_with_checkpoints.path)]
    assert CliRunner().invoke(app, arguments).stdout.splitlines() == ["step-2: whole", "step-4: whole"]
    victim = list_checkpoints(run_with_checkpoints.checkpoints)[0] / "optimizer-0.safetensors"
    content = victim.read_bytes()
    try:
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damaged = CliRunner().invoke(app, arguments)
        assert damaged.stdout.splitlines()[:2] == ["step-2: damaged", "step-4: whole"]
        assert "optimizer-0.safetensors is damaged" in str(damaged.exception)
    finally:
        victim.write_bytes(content)


def test_merge_writes_a_model_that_transformers_loads(
    run_with_checkpoints: RunFolder, tmp_path: Path
) -> None:
    newest = list_checkpoints(run_with_checkpoints.checkpoints)[-1]
    arguments = ["checkpoint", "merge", str(newest), "--out", str(tmp_path / "merged")]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.exception
    stored = read_weights(newest)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name]), name
    scales = {name for name in stored if name not in loaded}
    assert any(name.endswith("weight_scale") for name in scales)
    assert "exists" in str(CliRunner().invoke(app, arguments).exception)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-random-w4a8", ["export=[]"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5000))
    with pytest.raises(UserError, match=r"checkpoints .* need about .* MiB and 0.0 MiB are free"):
        check_inputs(recipe, RunFolder(tmp_path / "run"))
    assert not any(tmp_path.iterdir())
