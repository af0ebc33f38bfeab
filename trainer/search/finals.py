"""The last choice: finalists are measured on other and more text than the one they were found on.

Hundreds of assignments are compared on little text, so that the least of their divergences is partly luck: it
belongs to an assignment that suits this text. Text that none of them has seen has no favourites.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.search.budget import Budget
from qatapult.trainer.search.divergence import Divergence
from qatapult.trainer.search.state import SearchState

#: Blocks of text that finalists are measured on, for each block that the search looks at.
JUDGING_BLOCKS = 4
# Refined assignments that go into the finals, best first.
_REFINED = 8


@dataclass(frozen=True)
class Finalist:
    """An assignment, where it comes from, and its divergences.

    Attributes:
        origin: the measure whose integer program chose it, `second round` or `refined`.
        choice: candidate index of each group.
        divergence: on the search's own text, nats a token.
        judged: on the other text, nats a token.
    """

    origin: str
    choice: list[int]
    divergence: float
    judged: float


def judging_text(train: Blocks, blocks: int) -> Tensor:
    """Blocks behind those that the search looks at; where there are none, the search's own."""
    behind = train[blocks : blocks * (1 + JUDGING_BLOCKS)]
    return behind if len(behind) else train[:blocks]


def second_round(
    divergence: Divergence,
    costs: NDArray[np.float64],
    planned: list[int],
    state: SearchState,
    deadline: float,
    on_progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Measure single changes around the program's first answer.

    Gains overlap: raising two layers wins less than the sum of both. So around the answer the same changes
    are worth something else than around the recipe's grid.

    Args:
        divergence: its reference becomes `planned`.
        costs: `[groups, candidates]`, changes around the recipe's grid.
        planned: the program's answer to `costs`.
        state: measurements, old and new.
        deadline: `time.monotonic()` after which nothing more is measured.
        on_progress: called with the number of changes done.

    Returns:
        `[groups, candidates]`, zero for `planned`; what was not measured is as in `costs`.
    """
    pairs = [pair for pair in np.ndindex(*costs.shape) if pair[1] != planned[pair[0]]]
    # The best first: time may run out.
    pairs.sort(key=lambda pair: costs[pair])
    unmeasured = [pair for pair in pairs if state.assignment(_changed(planned, *pair)) is None]
    if unmeasured and time.monotonic() < deadline:
        state.remember(planned, divergence.set_reference(planned))
    for done, pair in enumerate(unmeasured):
        if time.monotonic() > deadline:
            break
        choice = _changed(planned, *pair)
        state.remember(choice, divergence.measure(choice))
        if on_progress is not None:
            on_progress(done + 1)
    start = state.assignment(planned)
    around = costs - costs[np.arange(len(planned)), planned][:, None]
    for i, j in pairs:
        value = state.assignment(_changed(planned, i, j))
        if start is not None and value is not None:
            around[i, j] = value - start
    return around


def finalists(
    named: Mapping[str, list[int]], state: SearchState, budgets: Sequence[Budget]
) -> list[tuple[str, list[int]]]:
    """The programs' answers, and the refinement's best ones within the budgets, each once."""
    found: dict[tuple[int, ...], str] = {}
    for origin, choice in named.items():
        found.setdefault(tuple(choice), origin)
    refined = sorted((value, choice) for choice, value in state.measured() if within(choice, budgets))
    room = len(found) + _REFINED
    for _, choice in refined:
        if len(found) == room:
            break
        found.setdefault(tuple(choice), "refined")
    return [(origin, list(choice)) for choice, origin in found.items()]


def judge(
    judging: Divergence,
    entries: Sequence[tuple[str, list[int]]],
    state: SearchState,
    deadline: float = math.inf,
    on_progress: Callable[[int], None] | None = None,
) -> list[Finalist]:
    """Measure finalists on the other text, in their order, best first in what is returned.

    The first is measured whatever the time; after the deadline the others are left out.
    """
    results: list[Finalist] = []
    for done, (origin, choice) in enumerate(entries):
        value = state.judgement(choice)
        if value is None:
            if results and time.monotonic() > deadline:
                break
            value = judging.measure(choice)
            state.judge(choice, value)
        known = state.assignment(choice)
        results.append(Finalist(origin, choice, math.nan if known is None else known, value))
        if on_progress is not None:
            on_progress(done + 1)
    return sorted(results, key=lambda finalist: finalist.judged)


def within(choice: Sequence[int], budgets: Sequence[Budget]) -> bool:
    """Whether an assignment keeps all budgets, to rounding."""
    return all(budget.used(choice) <= budget.limit * (1 + 1e-9) for budget in budgets)


def _changed(choice: Sequence[int], group: int, candidate: int) -> list[int]:
    return [*choice[:group], candidate, *choice[group + 1 :]]
