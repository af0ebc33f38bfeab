"""The batch plan and schedules: the same global batches on any number of processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatapult.trainer.loop.batches import BatchPlan
from qatapult.trainer.loop.schedules import learning_rate, phase_at, rate_factor
from qatapult.trainer.recipe.schema import Optimizer, Qat


@given(
    blocks=st.integers(1, 40),
    per_step=st.integers(1, 12),
    batch=st.integers(1, 5),
    world=st.integers(1, 5),
    step=st.integers(0, 9),
)
def test_any_number_of_processes_computes_the_same_global_batch(
    blocks: int, per_step: int, batch: int, world: int, step: int
) -> None:
    alone = BatchPlan(blocks, per_step, per_step).step(step)[0].tolist()
    plans = [BatchPlan(blocks, per_step, batch, rank, world) for rank in range(world)]
    parts = [plan.step(step) for plan in plans]
    assert {len(part) for part in parts} == {plans[0].micro_batches}
    together = [int(i) for part in parts for micro in part for i in micro if i >= 0]
    assert sorted(together) == sorted(alone)


def test_a_pass_visits_every_block_once_and_passes_differ() -> None:
    plan = BatchPlan(blocks=12, blocks_per_step=4, batch_size=4)
    first, second = (
        [i for step in steps for i in plan.step(step)[0].tolist()] for steps in (range(3), range(3, 6))
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_rates_rise_then_fall_to_the_end() -> None:
    settings = Optimizer(warmup=0.1, final=0.1)
    factors = [rate_factor(settings, step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_automatic_rate_rises_with_fewer_bits_and_falls_with_longer_runs() -> None:
    rates = [learning_rate(Optimizer(), bits, 60) for bits in (8, 4, 3, 2, 1.58)]
    assert rates == sorted(rates)
    assert learning_rate(Optimizer(), 4, 6000) < learning_rate(Optimizer(), 4, 60)


def test_phases_follow_each_other() -> None:
    phases = [
        {"weights": {"bits": bits}, "fraction": share} for bits, share in ((8, 0.25), (4, 0.25), (2, 0.5))
    ]
    qat = Qat.model_validate({"schedule": {"phases": phases}})
    assert [phase_at(qat, progress) for progress in (0, 0.2, 0.25, 0.49, 0.5, 1)] == [0, 0, 1, 1, 2, 2]
