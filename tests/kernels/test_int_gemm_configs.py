"""Block sizes: the nearest measured shape, else the rule; tables are stored, merged and pinned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qatapult.kernels.int_gemm.configs import (
    GemmConfig,
    Problem,
    VectorConfig,
    candidates,
    choose_config,
    default_config,
    pin_table,
    within_shared_memory,
    write_table,
)

DECODE = Problem(m=1, n=4096, k=4096, bits=4, group=0, activation_bits=8)
MEASURED = GemmConfig(64, 16, 16, warps=2, stages=6)


@pytest.fixture
def pinned(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "table.json"
    write_table(path, [(DECODE, MEASURED)])
    pin_table(path)
    yield path
    pin_table(None)


def test_the_nearest_measured_shape_of_the_same_kind_decides(pinned: Path) -> None:
    near = Problem(m=7, n=5120, k=4096, bits=4, group=0, activation_bits=8)
    assert choose_config(near, 90, 128) == MEASURED
    other_kind = Problem(m=7, n=5120, k=4096, bits=4, group=128, activation_bits=8)
    assert choose_config(other_kind, 90, 128) == default_config(other_kind, 90, 128)
    short = Problem(m=1, n=4096, k=256, bits=4, group=0, activation_bits=8)
    assert choose_config(short, 90, 128).split == 2


def test_a_second_sweep_adds_to_the_table(pinned: Path) -> None:
    prefill = Problem(m=4096, n=4096, k=4096, bits=4, group=0, activation_bits=8)
    write_table(pinned, [(prefill, GemmConfig(128, 256))])
    assert choose_config(prefill, 90, 128) == GemmConfig(128, 256)
    assert choose_config(DECODE, 90, 128) == MEASURED


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"problem": {}}]')
    for name in ("a.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            pin_table(tmp_path / name)


@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
def test_candidates_and_the_rule_fit_the_problem(m: int) -> None:
    problem = Problem(m, 4096, 4096, 4, 0, 8)
    for config in [*candidates(problem, 128), default_config(problem, 90, 128)]:
        if isinstance(config, VectorConfig):
            assert m == 1
            continue
        assert 1 <= config.split <= 4096 // 128
        assert 128 % config.block_n == 0
        assert config.block_m <= max(16, problem.bucket)


def test_the_kernel_for_one_token_is_chosen_only_where_it_can_run(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_table(path, [(DECODE, VectorConfig(4, 16, 2))])
    pin_table(path)
    try:
        assert choose_config(DECODE, 90, 128, vector=True) == VectorConfig(4, 16, 2)
        assert choose_config(DECODE, 90, 128) == default_config(DECODE, 90, 128)
    finally:
        pin_table(None)


def test_the_shipped_table_is_found() -> None:
    other = Problem(m=1, n=4096, k=4096, bits=4, group=0, activation_bits=8)
    assert choose_config(other, 90, 128) != default_config(other, 90, 128)


@pytest.mark.parametrize(
    ("unit", "unit_bytes", "element", "expected"),
    [(128, 64, 2, 128), (128, 64, 4, 128), (256, 64, 4, 64), (512, 192, 4, 32), (512, 192, 2, 32)],
    ids=["4 bits, bf16", "4 bits, fp32", "2 bits, fp32", "3 bits, fp32", "3 bits, bf16"],
)
def test_fewer_bits_take_fewer_tokens_a_program(
    unit: int, unit_bytes: int, element: int, expected: int
) -> None:
    """128 × 128 × 3 stages took 304 kB of a Hopper GPU's 227 at 2 bits and fp32."""
    rule = GemmConfig(128, 128, 1, warps=8, stages=3)
    assert within_shared_memory(rule, unit, unit_bytes, 64, element, 90) == replace(rule, block_m=expected)
