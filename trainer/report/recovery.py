"""Recovery: which share of what quantization cost came back, with its interval.

    recovery = (PTQ − QAT) / (PTQ − full precision)        for perplexity and other losses
    recovery = (QAT − PTQ) / (full precision − PTQ)        for accuracies

Both are one formula, `(QAT − PTQ) / (full precision − PTQ)`: 1 means all of it came back, 0 none, below 0
that training made it worse, above 1 that the result is better than the original. Where quantization cost
nothing, there is nothing to recover and the value is None.

Intervals are percentile bootstrap intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13) over *documents*, because the tokens of a document are not independent. The three models are
judged on the same documents, so a resample draws documents once and scores all three on them: what makes a
document hard cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Documents in one draw are counted in a matrix [resamples, documents]; this bounds its size (in elements).
_CHUNK_ELEMENTS = 8_000_000

Losses = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Recovery:
    """A recovery and its interval.

    Attributes:
        value: share of the cost that came back; None where quantization cost nothing.
        interval: lower and upper bound at the stated confidence; None where it cannot be had (no value, fewer
            than two documents, or a cost that is not distinguishable from zero on so few documents).
        log: the same share of log-perplexity (mean loss per token), which weighs large perplexities less.
        log_interval: its interval.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    log: float | None = None
    log_interval: tuple[float, float] | None = None


def recovery(
    full_precision: float, quantized: float, trained: float, higher_is_better: bool = False
) -> float | None:
    """Share of the cost of quantization that training won back.

    Args:
        full_precision: the metric of the original model.
        quantized: of the post-training-quantized model.
        trained: of the model after quantization-aware training.
        higher_is_better: True for accuracies, False for perplexities and losses.

    Returns:
        The share, or None if quantization cost nothing (the metric did not get worse) or a figure is not
        finite.
    """
    sign = 1.0 if higher_is_better else -1.0
    cost = sign * (full_precision - quantized)
    gained = sign * (trained - quantized)
    if not np.isfinite([cost, gained]).all() or cost <= 0:
        return None
    return gained / cost


def perplexity(losses: Losses) -> float:
    """Perplexity of documents given as (sum of losses in nats, tokens) each."""
    table = np.asarray(losses, dtype=np.float64)
    return float(np.exp(table[:, 0].sum() / table[:, 1].sum()))


def perplexity_recovery(
    full_precision: Losses,
    quantized: Losses,
    trained: Losses,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Recovery:
    """Recovery of perplexity with its bootstrap interval.

    Args:
        full_precision: (sum of losses in nats, tokens) of each held-out document under the original model.
        quantized: the same documents, in the same order, after post-training quantization.
        trained: the same documents after quantization-aware training.
        resamples: bootstrap resamples.
        confidence: coverage of the interval.
        seed: of the resampling; the same inputs always give the same interval.

    Raises:
        ValueError: if the three do not hold the same documents.
    """
    tables = [np.asarray(losses, dtype=np.float64) for losses in (full_precision, quantized, trained)]
    tokens = tables[0][:, 1]
    if any(table.shape != tables[0].shape or not np.array_equal(table[:, 1], tokens) for table in tables):
        shapes = ", ".join(f"{len(table)} documents / {table[:, 1].sum():.0f} tokens" for table in tables)
        raise ValueError(f"losses of full precision, PTQ and QAT are not of the same documents: {shapes}")
    columns = np.stack([*(table[:, 0] for table in tables), tokens], axis=1)
    sums = np.concatenate([columns.sum(axis=0)[None], resample_sums(columns, resamples, seed)])
    means = sums[:, :3] / sums[:, 3:]
    values, logs = _shares(np.exp(means)), _shares(means)
    return Recovery(
        value=_finite(values[0]),
        interval=_percentile_interval(values, confidence),
        log=_finite(logs[0]),
        log_interval=_percentile_interval(logs, confidence),
    )


def task_recovery(
    full_precision: dict[str, Any],
    quantized: dict[str, Any],
    trained: dict[str, Any],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Recovery:
    """Recovery of a task's score with its interval.

    Each argument is `{"value", "standard_error", "higher_is_better"}`, and may carry `"documents"`, the score
    of each document. With documents, the bootstrap resamples them, paired as for perplexity. Without, it
    draws the three scores from normal distributions of their standard errors; that ignores that the models
    answer the same questions, so the interval is wider than the paired one (conservative).
    """
    scores = (full_precision, quantized, trained)
    higher = bool(full_precision.get("higher_is_better", True))
    sign = 1.0 if higher else -1.0
    point = np.array([[sign * score["value"] for score in scores]])
    draws = _score_draws(scores, resamples, seed)
    values = _shares(-np.concatenate([point, sign * draws])) if draws is not None else _shares(-point)
    return Recovery(
        value=_finite(values[0]),
        interval=_percentile_interval(values, confidence) if draws is not None else None,
    )


def resample_sums(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of the columns over documents drawn with replacement.

    Args:
        columns: [documents, columns], float64.
        resamples: how many times to draw.
        seed: of the draws.

    Returns:
        [resamples, columns]. Drawing n of n documents is drawing their multinomial counts, so that a resample
        is one row of a matrix product.
    """
    documents = len(columns)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // documents)
    shares = np.full(documents, 1 / documents)
    chunks = [
        generator.multinomial(documents, shares, size=min(rows, resamples - done)) @ columns
        for done in range(0, resamples, rows)
    ]
    return np.concatenate(chunks) if chunks else np.empty((0, columns.shape[1]))


def _score_draws(scores: Sequence[dict[str, Any]], resamples: int, seed: int) -> np.ndarray | None:
    """Draws of the three scores [resamples, 3]; None if neither documents nor standard errors are known."""
    documents = [score.get("documents") for score in scores]
    if all(documents) and len({len(values) for values in documents if values}) == 1:
        columns = np.asarray(documents, dtype=np.float64).T
        return resample_sums(columns, resamples, seed) / len(columns)
    if any(score.get("standard_error") is None for score in scores):
        return None
    generator = np.random.default_rng(seed)
    return generator.normal(
        [score["value"] for score in scores], [score["standard_error"] for score in scores], (resamples, 3)
    )


def _shares(values: np.ndarray) -> np.ndarray:
    """Recovery of each row [full precision, PTQ, QAT] of losses; NaN where quantization cost nothing."""
    cost = values[:, 1] - values[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(cost > 0, (values[:, 1] - values[:, 2]) / cost, np.nan)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of `values[1:]` around `values[0]`.

    A resample in which quantization cost nothing could have any recovery, so each such resample counts
    against both ends; when there are more of them than the tails hold, the interval is unbounded and None is
    given.
    """
    draws = values[1:]
    tail = (1 - confidence) / 2
    unbounded = np.count_nonzero(~np.isfinite(draws))
    if not np.isfinite(values[0]) or len(draws) < 2 or unbounded / len(draws) >= tail or np.ptp(draws) == 0:
        return None
    low = np.quantile(np.nan_to_num(draws, nan=-np.inf), tail, method="inverted_cdf")
    high = np.quantile(np.nan_to_num(draws, nan=np.inf), 1 - tail, method="inverted_cdf")
    return float(low), float(high)
