"""Cached teacher logits: written by several processes, resumed, verified, and nearly as good as the whole teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatapult.trainer.distill.cache import (
    CachedTeacher,
    CacheFormat,
    read_layout,
    top_k,
    verify_cache,
    write_cache,
)
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


def test_what_is_read_is_what_the_teacher_said(teacher: torch.nn.Module, tmp_path: Path) -> None:
    for rank in range(2):
        write_cache(tmp_path, layout(), teacher, BLOCKS, rank, world_size=2)
    signal = CachedTeacher(tmp_path, "print", 1.0, CPU).signal(BLOCKS[[7, 2]], torch.tensor([7, 2]))
    indices, logprobs, tail = top_k(teacher, BLOCKS[[7, 2]], 32, 1.0)
    assert torch.equal(signal.top_indices, indices)
    torch.testing.assert_close(signal.top_logprobs, logprobs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signal.tail_mass, tail)
    assert layout().bits_per_token == 32 * 32 + 32


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
    with pytest.raises(UserError, match="another teacher, text or k"):
        write_cache(tmp_path, layout(k=8), teacher, BLOCKS)
    shard = tmp_path / "shard-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"shard-000002.*damaged"):
        CachedTeacher(tmp_path, "print", 1.0, CPU)
    assert read_layout(tmp_path) == layout()
