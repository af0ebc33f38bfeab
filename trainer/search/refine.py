"""Refinement where layers interact: whole assignments are measured, and Optuna proposes which.

The integer program believes that changes add up. Around its answer they do not quite: so Optuna's
multi-objective sampler varies the gains it believes in, for the groups whose membership is in doubt, and the
budget; every proposal is solved exactly, hence within its budget, and measured whole. Objectives are use of
the budget and divergence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import optuna
from numpy.typing import NDArray

from qatapult.trainer.search.budget import Budget
from qatapult.trainer.search.program import frontier, solve

# Groups whose gain is varied; more dimensions than that cannot be explored with some tens of measurements.
_DOUBTFUL = 16
# Natural logarithm of the largest factor on a gain.
_REACH = 1.0


def refine(
    costs: NDArray[np.float64],
    budgets: Sequence[Budget],
    measure: Callable[[list[int]], float],
    trials: int,
    seed: int = 0,
    deadline: float = math.inf,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Measure up to `trials` further assignments within the budgets.

    Args:
        costs: `[groups, candidates]`, what the integer program minimizes.
        budgets: all are kept; the first is the second objective.
        measure: measures and remembers the divergence of an assignment.
        trials: number of proposals; one that was measured before costs no time.
        seed: of the sampler.
        deadline: `time.monotonic()` after which no further proposal is measured.
        on_progress: called with the number of proposals done.
    """
    doubtful = doubtful_groups(costs, budgets)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=max(4, trials // 4))
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    # Where every factor is 1: the integer program's own answer.
    study.enqueue_trial({f"gain_{group}": 0.0 for group in doubtful} | {"budget": 1.0})

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        varied = costs.copy()
        for group in doubtful:
            varied[group] *= math.exp(trial.suggest_float(f"gain_{group}", -_REACH, _REACH))
        share = trial.suggest_float("budget", 0.9, 1.0)
        choice = solve(varied, [_shrunk(budgets[0], share), *budgets[1:]])
        return budgets[0].used(choice), measure(choice)

    for done in range(trials):
        if time.monotonic() > deadline:
            break
        study.optimize(objective, n_trials=1)
        if on_progress is not None:
            on_progress(done + 1)


def doubtful_groups(costs: NDArray[np.float64], budgets: Sequence[Budget]) -> list[int]:
    """Groups whose choice depends on the exact budget: those that change along the front around it."""
    best = solve(costs, budgets)
    changes = np.zeros(len(costs))
    for _, choice in frontier(costs, budgets[0], points=17, reach=0.15):
        changes += np.array(choice) != np.array(best)
    order = np.argsort(-changes, kind="stable")
    return [int(group) for group in order[:_DOUBTFUL] if changes[group] > 0]


def _shrunk(budget: Budget, share: float) -> Budget:
    """The budget with part of its room above the least possible use taken away."""
    least = budget.fixed + float(budget.usage.min(axis=1).sum())
    limit = least + share * (budget.limit - least)
    return Budget(budget.kind, budget.value, budget.usage, budget.fixed, limit * (1 + 1e-12))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates, by rising first coordinate."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    front, lowest = [], math.inf
    for index in order:
        if points[index][1] < lowest:
            front.append(index)
            lowest = points[index][1]
    return front
