"""Bits learned by gradient descent: every group is a mixture of its candidates, whose shares are trained.

The relaxation is that of differentiable architecture search (DARTS, arXiv:1806.09055; for bit widths
EdMIPS, arXiv:2004.05795): the weight of a group is Σ_c p_c · W_c with p = softmax(α), the loss is the
divergence plus a penalty for exceeding the budget, and only α is trained; the model's weights stay. The
gradient ∂L/∂p_c = ⟨∂L/∂W, W_c⟩ needs one backward pass for all groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qatapult.trainer.search.budget import Budget
from qatapult.trainer.search.divergence import Divergence
from qatapult.trainer.search.sensitivity import Costs, Progress, searched_weights

# Share that all other candidates of a group have at the beginning, unless that exceeds a budget.
_FIRST_SHARE = 0.2
# … and which they have in any case: at zero nothing is learned.
_LEAST_SHARE = 0.01
# Weight of the penalty: the divergence that exceeding the budget by its whole size costs, over the
# reference's.
_PENALTY = 10.0


def learned_costs(
    divergence: Divergence,
    reference: Sequence[int],
    budgets: Sequence[Budget],
    steps: int = 24,
    rate: float = 0.3,
    on_progress: Progress | None = None,
) -> Costs:
    """Train the shares of every group's candidates.

    Args:
        divergence: supplies model, text and teacher.
        reference: candidate that every group mostly is at first.
        budgets: exceeding any of them on average is penalized.
        steps: gradient steps, each on one block of text.
        rate: Adam's learning rate.
        on_progress: called with the number of steps done.

    Returns:
        log (p at the beginning / p), `[groups, candidates]`: the integer program over them picks, within the
        budgets, the assignment that training made likelier most.
    """
    switching = divergence.switching
    switching.set(reference)
    first = _first_scores(len(switching.candidates), reference, budgets)
    scores = first.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([scores], lr=rate)
    unit = max(float(divergence.measure(reference)), 1e-6)
    for step in range(steps):
        shares = scores.softmax(dim=-1)
        for group, row in enumerate(shares.detach().tolist()):
            switching.mix(group, row)
        loss = (shares * _share_gradients(divergence, step % len(divergence.text))).sum()
        loss = loss + unit * _PENALTY * _excess(shares, budgets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_progress is not None:
            on_progress(step + 1)
    switching.set(reference)
    costs: Costs = (first - scores.detach().log_softmax(dim=-1)).numpy().astype(np.float64)
    return costs


def _first_scores(candidates: int, reference: Sequence[int], budgets: Sequence[Budget]) -> torch.Tensor:
    """Log-shares, the same for every group, that use no budget up: else the penalty decides alone."""
    if candidates == 1:
        return torch.zeros(len(reference), 1)
    rows, others = np.arange(len(reference)), _FIRST_SHARE
    for budget in budgets:
        at_reference = budget.usage[rows, reference]
        # Use of the budget when every group is any other candidate, beyond that of the reference.
        more = float((budget.usage.sum(axis=1) - at_reference).sum() / (candidates - 1) - at_reference.sum())
        if more > 0:
            others = min(others, (budget.limit - budget.fixed - float(at_reference.sum())) / more)
    others = max(others, _LEAST_SHARE)
    scores = torch.full((len(reference), candidates), float(np.log(others / (candidates - 1))))
    scores[torch.from_numpy(rows), torch.tensor(reference)] = float(np.log(1 - others))
    return scores


def _share_gradients(divergence: Divergence, row: int) -> torch.Tensor:
    """⟨∂L/∂W, W_c⟩ of every group and candidate on one block of text, `[groups, candidates]`."""
    switching = divergence.switching
    with searched_weights(switching) as weights:
        loss = divergence.differentiable(slice(row, row + 1))
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    found = torch.zeros(len(switching.groups), len(switching.candidates))
    for i, group in enumerate(switching.groups):
        for j in range(len(switching.candidates)):
            found[i, j] = sum(
                float((gradients[name] * switching.quantized(name, j)).sum()) for name in group.layers
            )
    return found


def _excess(shares: torch.Tensor, budgets: Sequence[Budget]) -> torch.Tensor:
    """Squared relative excess of the expected use over every budget."""
    total = shares.new_zeros(())
    for budget in budgets:
        used = budget.fixed + (shares * torch.from_numpy(budget.usage).to(shares)).sum()
        total = total + (used / max(budget.limit, 1e-12) - 1).clamp(min=0).square()
    return total
