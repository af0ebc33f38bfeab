"""Budgets: what an assignment may use, as linear constraints over groups and candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.search.candidates import Candidate
from qatapult.trainer.search.groups import Group

KINDS = ("average_bits", "size_gb", "w8_fraction", "tokens_per_second")
_GIGABYTE_BITS = 8e9
# Bytes of a weight outside of the quantized layers, as deployments store embeddings and norms.
_OTHER_BITS = 16


@dataclass(frozen=True)
class Budget:
    """One limit, as the user says it and as the program needs it.

    Attributes:
        kind: one of `KINDS`.
        value: the user's figure.
        usage: `[groups, candidates]`, what each choice uses.
        fixed: what is used in any case.
        limit: upper bound of the sum.
    """

    kind: str
    value: float
    usage: NDArray[np.float64]
    fixed: float
    limit: float

    def used(self, choice: Sequence[int]) -> float:
        """What an assignment uses, `fixed` included, in units of `limit`."""
        return self.fixed + float(self.usage[np.arange(len(choice)), list(choice)].sum())

    def shown(self, choice: Sequence[int]) -> float:
        """What an assignment reaches, in the user's units."""
        used = self.used(choice)
        return 1 / used if self.kind == "tokens_per_second" else used


def parse_budget(text: str) -> tuple[str, float]:
    """`average_bits=4.25` to its parts.

    Raises:
        UserError: for another kind, or a value that is no positive number.
    """
    kind, equals, number = text.partition("=")
    if kind not in KINDS or not equals:
        raise UserError(f"--budget {text!r} is not one of {', '.join(f'{kind}=…' for kind in KINDS)}")
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"--budget {text!r}: {number!r} is not a number") from None
    if not np.isfinite(value) or value < 0 or (value == 0 and kind != "w8_fraction"):
        raise UserError(f"--budget {text!r}: the value must be positive")
    if kind == "w8_fraction" and value > 1:
        raise UserError(f"--budget {text!r}: a fraction is at most 1, such as w8_fraction=0.05")
    return kind, value


def make_budget(
    text: str,
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    other_weights: int,
    latency: Path | None = None,
) -> Budget:
    """A budget over these groups and candidates.

    Args:
        text: `average_bits=4.25` (scales included), `size_gb=0.1` (whole model, other weights in 16 bits),
            `w8_fraction=0.05` (share of the quantized weights in 8 bits), or `tokens_per_second=100`.
        groups: the decisions.
        candidates: what each may be.
        other_weights: number of weights outside of the groups.
        latency: for `tokens_per_second`, a JSON file `{"other_ms": 1.5, "ms": {"1536x576": {"4": 0.1, "8":
            0.2}}}` with milliseconds a token of a layer of `N`x`K` weights, by bits or by candidate name.

    Raises:
        UserError: for a budget that no assignment can meet; the message says what the least is.
    """
    kind, value = parse_budget(text)
    bits = np.array([[candidate.bits(group) for candidate in candidates] for group in groups])
    weights = np.array([group.weights for group in groups], dtype=np.float64)
    fixed = 0.0
    if kind == "average_bits":
        usage, limit = bits / weights.sum(), value
    elif kind == "size_gb":
        usage, limit = bits / _GIGABYTE_BITS, value
        fixed = other_weights * _OTHER_BITS / _GIGABYTE_BITS
    elif kind == "w8_fraction":
        is_eight = np.array([candidate.scheme.bits == 8 for candidate in candidates], dtype=np.float64)
        usage, limit = np.outer(weights / weights.sum(), is_eight), value
    else:
        usage, fixed = _seconds(groups, candidates, latency)
        limit = 1 / value
    budget = Budget(kind, value, usage, fixed, limit)
    least = fixed + usage.min(axis=1).sum()
    if least > limit * (1 + 1e-9):
        best = 1 / least if kind == "tokens_per_second" else least
        word = "most" if kind == "tokens_per_second" else "least"
        raise UserError(f"--budget {text!r} cannot be met: with these candidates the {word} is {best:.4g}")
    return budget


def _seconds(
    groups: Sequence[Group], candidates: Sequence[Candidate], latency: Path | None
) -> tuple[NDArray[np.float64], float]:
    if latency is None:
        raise UserError(
            "--budget tokens_per_second=… needs --latency FILE, a table of milliseconds by layer shape"
        )
    try:
        table = json.loads(latency.read_text(encoding="utf-8"))
        by_shape = table["ms"]
        other = float(table["other_ms"]) / 1000
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--latency {latency}: not a readable latency table ({type(error).__name__}: {error})"
        ) from None
    seconds = np.zeros((len(groups), len(candidates)))
    for i, group in enumerate(groups):
        for j, candidate in enumerate(candidates):
            for rows, columns in group.shapes:
                row = by_shape.get(f"{rows}x{columns}", {})
                entry = row.get(candidate.name, row.get(f"{candidate.scheme.bits:g}"))
                if entry is None:
                    raise UserError(
                        f"--latency {latency}: no entry for a {rows}x{columns} layer at {candidate.name}"
                    )
                seconds[i, j] += float(entry) / 1000
    return seconds, other
