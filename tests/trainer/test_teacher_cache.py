"""Cached teacher logits: written by several processes, resumed, verified, and nearly as good as the whole teacher."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.distill.cache import (
    CachedTeacher,
    CacheFormat,
    read_layout,
    verify_cache,
    write_cache,
)
from qatapult.trainer.distill.cache_check import check_cache
from qatapult.trainer.distill.entries import likeliest
from qatapult.trainer.distill.student import Student
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Distillation, Model, Quantization

BLOCKS = torch.randint(0, 256, (10, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def layout(k: int = 32, vocabulary: int = 384) -> CacheFormat:
    return CacheFormat("print", "random:tiny", len(BLOCKS), 16, vocabulary, k, shard_blocks=4)


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    return load_model(Model(source="random:tiny"))


@pytest.fixture(scope="module")
def decided(teacher: torch.nn.Module) -> torch.nn.Module:
    """A teacher that is sure of some positions, as trained ones are."""
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.linspace(1, 12, 64))
    return model


def test_what_is_read_is_what_the_teacher_said(teacher: torch.nn.Module, tmp_path: Path) -> None:
    for rank in range(2):
        write_cache(tmp_path, layout(), teacher, BLOCKS, rank, world_size=2)
    signal = CachedTeacher(tmp_path, "print", 1.0, CPU).signal(BLOCKS[[7, 2]], torch.tensor([7, 2]))
    entries = likeliest(teacher, BLOCKS[[7, 2]], 32, 1.0)
    assert torch.equal(signal.top_indices, entries.indices)
    torch.testing.assert_close(signal.top_logprobs, entries.logprobs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signal.tail_mass, entries.tail)
    assert layout().most_bits_per_token == 32 * 32 + 32


def test_the_loss_is_close_to_that_of_the_whole_teacher(teacher: torch.nn.Module, tmp_path: Path) -> None:
    student = prepare(load_model(Model(source="random:tiny")), Quantization(weights={"bits": 2}))
    forward = Student(student, Distillation())
    ids, blocks, present = BLOCKS[:4], torch.arange(4), torch.ones(4, dtype=torch.bool)
    whole = forward(ids, present, InProcessTeacher(teacher).signal(ids, blocks))
    errors = []
    for k in (8, 64, 383):
        folder = tmp_path / str(k)
        write_cache(folder, layout(k), teacher, BLOCKS)
        cached = forward(ids, present, CachedTeacher(folder, "print", 1.0, CPU).signal(ids, blocks))
        errors.append(abs(float(cached.loss / whole.loss) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_an_interrupted_cache_is_gone_on_with(teacher: torch.nn.Module, tmp_path: Path) -> None:
    write_cache(tmp_path, layout(), teacher, BLOCKS, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"shard-000001.*missing"):
        verify_cache(tmp_path)
    before = (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns
    write_cache(tmp_path, layout(), teacher, BLOCKS)
    verify_cache(tmp_path)
    assert (tmp_path / "shard-000000.safetensors").stat().st_mtime_ns == before


def test_damage_and_other_data_are_named(teacher: torch.nn.Module, tmp_path: Path) -> None:
    write_cache(tmp_path, layout(), teacher, BLOCKS)
    with pytest.raises(UserError, match="other tokens"):
        CachedTeacher(tmp_path, "another print", 1.0, CPU)
    with pytest.raises(UserError, match="temperature 1"):
        CachedTeacher(tmp_path, "print", 2.0, CPU)
    with pytest.raises(UserError, match="another teacher, text, k or p"):
        write_cache(tmp_path, layout(k=8), teacher, BLOCKS)
    shard = tmp_path / "shard-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"shard-000002.*damaged"):
        CachedTeacher(tmp_path, "print", 1.0, CPU)
    assert read_layout(tmp_path) == layout()


def test_damaged_shards_are_written_anew_and_no_others(teacher: torch.nn.Module, tmp_path: Path) -> None:
    write_cache(tmp_path, layout(), teacher, BLOCKS)
    content = {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in content}
    (tmp_path / "shard-000001.safetensors").write_bytes(b"half")
    write_cache(tmp_path, layout(), teacher, BLOCKS)
    verify_cache(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")} == content
    changed = {name for name, time in times.items() if (tmp_path / name).stat().st_mtime_ns != time}
    assert changed == {"shard-000001.safetensors"}


@pytest.mark.parametrize("vocabulary", [384, 2**17])
def test_top_p_keeps_what_holds_the_mass(decided: torch.nn.Module, tmp_path: Path, vocabulary: int) -> None:
    form = replace(layout(k=64, vocabulary=vocabulary), top_p=0.9)
    write_cache(tmp_path, form, decided, BLOCKS)
    ids, blocks = BLOCKS[[7, 2, 9]], torch.tensor([7, 2, 9])
    signal = CachedTeacher(tmp_path, "print", 1.0, CPU).signal(ids, blocks)
    probabilities = decided(ids).logits.softmax(-1).sort(-1, descending=True)
    mass = probabilities.values.double().cumsum(-1)
    needed = (1 + (mass < 0.9).sum(-1)).clamp(max=64)
    filler = signal.top_indices == signal.top_indices[..., :1]
    counts = 1 + (~filler).sum(-1)
    assert torch.equal(counts, needed)
    assert len(counts.unique()) > 3
    kept = mass.gather(-1, counts.unsqueeze(-1) - 1).squeeze(-1).float()
    torch.testing.assert_close(1 - signal.tail_mass, kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(signal.top_indices[..., 0], probabilities.indices[..., 0])


def test_top_p_and_top_k_of_everything_give_the_whole_loss(decided: torch.nn.Module, tmp_path: Path) -> None:
    student = Student(
        prepare(load_model(Model(source="random:tiny")), Quantization(weights={"bits": 2})), Distillation()
    )
    found = {}
    for name, form in {
        "p": replace(layout(k=383), top_p=0.9),
        "k": layout(k=383),
        "few": replace(layout(k=383), top_p=0.3),
    }.items():
        write_cache(tmp_path / name, form, decided, BLOCKS)
        reader = CachedTeacher(tmp_path / name, "print", 1.0, CPU)
        found[name] = check_cache(tmp_path / name, reader, decided, student, BLOCKS, count=4, batch_size=2)
    whole, most, few = found["k"], found["p"], found["few"]
    assert whole.cached_loss == pytest.approx(whole.full_loss, rel=5e-3)
    assert whole.gradient_cosine > 0.999
    assert few.cached_loss < most.cached_loss < most.full_loss == pytest.approx(whole.full_loss)
    assert few.gradient_cosine < most.gradient_cosine
    assert most.kept_mass >= 0.9 > few.kept_mass
    assert few.kept_tokens < most.kept_tokens < whole.kept_tokens == 383
    assert few.bits_per_token < most.bits_per_token < whole.bits_per_token
    assert whole.tokens == 64


def test_two_jobs_write_one_cache_at_once(teacher: torch.nn.Module, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write_cache, tmp_path / "both", layout(), teacher, BLOCKS) for _ in range(2)]
        for job in jobs:
            job.result(60)
    write_cache(tmp_path / "one", layout(), teacher, BLOCKS)
    verify_cache(tmp_path / "both")
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert (tmp_path / "both" / file.name).read_bytes() == file.read_bytes()


def test_the_command_reports_loss_and_bits(tmp_path: Path) -> None:
    options = ["tiny-random-w4a8", "data.train=[{kind: cpython_docs, documents: 4}]", "ptq.methods=[rtn]"]
    runner = CliRunner()
    folder = str(tmp_path / "cache")
    written = runner.invoke(app, ["teacher", "cache", *options, "--out", folder, "--top-p", "0.9"])
    assert written.exit_code == 0, written.output
    assert "bits a token" in written.output
    checked = runner.invoke(app, ["teacher", "check", *options, "--cache", folder, "--blocks", "2", "--json"])
    assert checked.exit_code == 0, checked.output
    found = json.loads(checked.output)
    assert 0 < found["cached_loss"] <= found["full_loss"]
    assert 0.9 < found["gradient_cosine"] <= 1
    shown = runner.invoke(app, ["teacher", "check", *options, "--cache", folder, "--blocks", "2"])
    assert "cosine of the two gradients" in shown.output
