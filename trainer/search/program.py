"""The exact choice: a multiple-choice knapsack as an integer program, solved by HiGHS."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.search.budget import Budget

_TIME_LIMIT = 60.0


def solve(costs: NDArray[np.float64], budgets: Sequence[Budget]) -> list[int]:
    """The assignment of least total cost within all budgets.

    minimize Σ cost[g, c] · x[g, c]  over x ∈ {0, 1}, Σ_c x[g, c] = 1 for every group g,
    and for every budget Σ usage[g, c] · x[g, c] ≤ limit − fixed.

    Args:
        costs: `[groups, candidates]`, finite.
        budgets: limits over the same groups and candidates.

    Returns:
        Index of the candidate of each group.

    Raises:
        UserError: if the budgets contradict each other.
        RuntimeError: if the solver fails for another reason.
    """
    groups, candidates = costs.shape
    one_each = csr_array(
        (
            np.ones(groups * candidates),
            (np.repeat(np.arange(groups), candidates), np.arange(groups * candidates)),
        )
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for budget in budgets:
        room = budget.limit - budget.fixed
        # Scaled to 1, so that the solver's feasibility tolerance means the same for gigabytes and for bits.
        unit = max(abs(room), float(budget.usage.max()), 1e-300)
        constraints.append(LinearConstraint(budget.usage.reshape(1, -1) / unit, -np.inf, room / unit))
    scale = float(np.abs(costs).max()) or 1.0
    with _silent():
        result = milp(
            costs.ravel() / scale,
            integrality=np.ones(groups * candidates),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": _TIME_LIMIT},
        )
    if result.status == 2:
        named = " and ".join(f"{budget.kind}={budget.value:g}" for budget in budgets)
        raise UserError(f"--budget {named}: no assignment meets all of them together")
    if result.x is None:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    choice: list[int] = result.x.reshape(groups, candidates).argmax(axis=1).tolist()
    return choice


@contextmanager
def _silent() -> Iterator[None]:
    """Keep standard output free of HiGHS, which reports to it from C whatever `disp` says."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def frontier(
    costs: NDArray[np.float64], budget: Budget, points: int = 9, reach: float = 0.5
) -> list[tuple[Budget, list[int]]]:
    """Best assignments at budgets around the given one, from the least possible use upward.

    Args:
        costs: as in `solve`.
        budget: its limit is varied; other fields stay.
        points: number of budgets.
        reach: the largest budget is this share of the way from the given limit to the most that can be used.
    """
    least = budget.fixed + float(budget.usage.min(axis=1).sum())
    most = budget.fixed + float(budget.usage.max(axis=1).sum())
    highest = budget.limit + reach * max(0.0, most - budget.limit)
    found = []
    for limit in np.linspace(least, highest, points):
        at = Budget(budget.kind, budget.value, budget.usage, budget.fixed, float(limit) * (1 + 1e-12))
        found.append((at, solve(costs, [at])))
    return found
