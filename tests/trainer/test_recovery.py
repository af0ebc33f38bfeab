"""Recovery: the formula, its intervals, and what happens where it means nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatapult.trainer.report.recovery import (
    perplexity,
    perplexity_recovery,
    recovery,
    resample_sums,
    task_recovery,
)


@pytest.mark.parametrize(
    ("full", "ptq", "qat", "higher", "expected"),
    [
        (5.68, 6.02, 5.79, False, 0.6765),  # W4A8 of LLaMA-7B
        (0.81, 0.62, 0.785, True, 0.8684),
        (10.0, 20.0, 25.0, False, -0.5),
        (10.0, 20.0, 9.0, False, 1.1),
    ],
)
def test_formula(full: float, ptq: float, qat: float, higher: bool, expected: float) -> None:
    assert recovery(full, ptq, qat, higher) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("full", "ptq"), [(10.0, 10.0), (10.0, 9.5), (float("nan"), 12.0), (10.0, float("inf"))]
)
def test_nothing_to_recover(full: float, ptq: float) -> None:
    assert recovery(full, ptq, 9.9) is None


@given(
    st.floats(1, 100),
    st.floats(0.01, 100),
    st.floats(-2, 3),
    st.floats(0.1, 10),
    st.floats(-50, 50),
    st.booleans(),
)
def test_scale_and_shift_do_not_matter(
    full: float, cost: float, share: float, factor: float, shift: float, higher: bool
) -> None:
    sign = -1 if higher else 1
    ptq = full + sign * cost
    qat = ptq - sign * share * cost
    original = recovery(full, ptq, qat, higher)
    moved = recovery(full * factor + shift, ptq * factor + shift, qat * factor + shift, higher)
    assert original == pytest.approx(share, abs=1e-6)
    assert moved == pytest.approx(share, abs=1e-3)


def documents(
    rng: np.random.Generator, count: int, mean: float, base: np.ndarray, noise: float
) -> list[list[float]]:
    tokens = np.arange(count) % 7 * 50 + 100
    return [
        [float(loss * n), int(n)]
        for loss, n in zip(base + mean + rng.normal(0, noise, count), tokens, strict=True)
    ]


def test_point_is_that_of_the_perplexities() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.7, 0.4, 30)
    full, ptq, qat = (documents(rng, 30, mean, base, 0.05) for mean in (0.0, 0.7, 0.1))
    result = perplexity_recovery(full, ptq, qat)
    assert result.value == pytest.approx(recovery(perplexity(full), perplexity(ptq), perplexity(qat)))
    logs = [math.log(perplexity(losses)) for losses in (full, ptq, qat)]
    assert result.log == pytest.approx((logs[1] - logs[2]) / (logs[1] - logs[0]))
    assert result.interval is not None
    assert result.interval[0] < result.value < result.interval[1]
    assert perplexity_recovery(full, ptq, qat) == result  # the same inputs give the same interval


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % intervals from 40 documents each, drawn 200 times from a known population."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        base = rng.normal(2.7, 0.4, 40)
        ptq = base + 0.7 + rng.normal(0, 0.15, 40)
        qat = base + 0.1 + rng.normal(0, 0.05, 40)
        tables = [[[float(x) * 200, 200] for x in column] for column in (base, ptq, qat)]
        bounds = perplexity_recovery(*tables, resamples=400, seed=trial).log_interval
        assert bounds is not None
        covered += bounds[0] <= 0.6 / 0.7 <= bounds[1]
    assert 0.90 <= covered / 200 <= 0.985


def test_pairing_makes_the_interval_narrow() -> None:
    """What makes a document hard is shared by the models: only the differences may widen the interval."""
    rng = np.random.default_rng(2)
    base = rng.normal(2.7, 1.0, 25)
    full, ptq, qat = (documents(rng, 25, mean, base, 0.0) for mean in (0.0, 0.7, 0.1))
    bounds = perplexity_recovery(full, ptq, qat).interval
    assert bounds is None or bounds[1] - bounds[0] < 1e-9


def test_no_interval_where_the_cost_is_not_distinguishable_from_zero() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(2.7, 0.4, 12)
    full, ptq, qat = (documents(rng, 12, mean, base, 0.3) for mean in (0.0, 0.02, 0.01))
    assert perplexity_recovery(full, ptq, qat).interval is None
    one = [[300.0, 100]]
    assert perplexity_recovery(one, [[370.0, 100]], [[310.0, 100]]).interval is None


def test_documents_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="not of the same documents: 1 documents / 100 tokens"):
        perplexity_recovery([[300.0, 100]], [[300.0, 101]], [[300.0, 100]])


def test_resampling_draws_whole_documents() -> None:
    columns = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resample_sums(columns, 5000, seed=0)
    assert sums.shape == (5000, 2)
    assert np.array_equal(sums[:, 1], 10 * sums[:, 0])
    assert sums.mean(axis=0) == pytest.approx(columns.sum(axis=0), rel=0.02)


def test_task_intervals_with_and_without_documents() -> None:
    rng = np.random.default_rng(4)
    answers = rng.random((400, 1)) < np.array([[0.8]])
    full = answers[:, 0].astype(float)
    ptq = np.where(rng.random(400) < 0.3, 0.0, full)
    qat = np.where(rng.random(400) < 0.05, 0.0, full)
    score = lambda values: {  # noqa: E731
        "value": values.mean(),
        "standard_error": values.std() / 20,
        "higher_is_better": True,
    }
    loose = task_recovery(score(full), score(ptq), score(qat))
    paired = task_recovery(*({**score(v), "documents": v.tolist()} for v in (full, ptq, qat)))
    assert loose.value == paired.value
    assert loose.interval is not None
    assert paired.interval is not None
    assert paired.interval[1] - paired.interval[0] < loose.interval[1] - loose.interval[0]
    nothing_known = {"value": 0.5, "higher_is_better": True}
    assert task_recovery(nothing_known, {**nothing_known, "value": 0.4}, nothing_known).interval is None
