"""The search from a recipe to an assignment: estimate, measure, choose, refine, judge on other text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.search.budget import Budget, make_budget, parse_budget
from qatapult.trainer.search.candidates import Candidate, describe, parse_candidates
from qatapult.trainer.search.divergence import Divergence
from qatapult.trainer.search.finals import Finalist, finalists, judge, judging_text, second_round
from qatapult.trainer.search.groups import Group, find_groups
from qatapult.trainer.search.learned import learned_costs
from qatapult.trainer.search.program import frontier, solve
from qatapult.trainer.search.refine import refine
from qatapult.trainer.search.sensitivity import fisher_costs, hessian_costs, measured_changes, slope_costs
from qatapult.trainer.search.state import SearchState, open_state
from qatapult.trainer.search.switching import SwitchingModel

#: Estimates of sensitivity; each one's assignment is measured whole, so that the best one wins.
MEASURES = ("fisher", "hessian", "learned")
# Shares of the time limit after which single changes around the recipe's grid, those around the program's
# answer, and the refinement give way to what follows.
_MEASURING_SHARE, _ROUND_SHARE, _REFINING_SHARE = 0.45, 0.7, 0.8


@dataclass(frozen=True)
class SearchSettings:
    """How much a search looks at.

    Attributes:
        budgets: texts such as `average_bits=4.25`; all of them are kept.
        candidates: texts such as `8` or `4:g32`, beside the recipe's own grid.
        blocks: calibration blocks.
        block_size: tokens each.
        trials: whole assignments that the refinement proposes.
        seconds: time limit of the whole search.
        fused: whether q/k/v and gate/up must agree.
        measures: estimates to compute beside the measured divergence: `fisher`, `hessian`, `learned`.
        learning_steps: gradient steps of the measure `learned`.
        latency: table of milliseconds by layer shape, for the budget `tokens_per_second`.
    """

    budgets: tuple[str, ...]
    candidates: tuple[str, ...] = ("8",)
    blocks: int = 8
    block_size: int = 128
    trials: int = 96
    seconds: float = 600.0
    fused: bool = True
    measures: tuple[str, ...] = ("fisher", "hessian")
    learning_steps: int = 24
    latency: Path | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        choice: candidate index of each group.
        divergence: measured KL of the choice, nats a token, on the text that was searched on.
        reference_divergence: the same of the recipe's own grid.
        judged: KL of the choice on other text, which decided among the finalists.
        reference_judged: the same of the recipe's own grid.
        costs: `[groups, candidates]`, change of the divergence that the program worked with.
        predicted: what the costs add up to for the choice.
        rivals: measured divergence of the assignment that the program chooses by each measure alone.
        finals: the finalists, best on the other text first; the first is the choice.
        front: `(use of the first budget, measured or predicted divergence, measured?)` of other assignments.
    """

    groups: list[Group]
    candidates: list[Candidate]
    budgets: list[Budget]
    reference: list[int]
    choice: list[int]
    divergence: float
    reference_divergence: float
    judged: float
    reference_judged: float
    predicted: float
    costs: NDArray[np.float64]
    estimates: dict[str, NDArray[np.float64]]
    rivals: dict[str, float]
    finals: list[Finalist]
    front: list[tuple[float, float, bool]]
    measured_changes: int
    seconds: float


def search(recipe: Recipe, settings: SearchSettings, folder: Path, console: Console) -> SearchResult:
    """Decide the grid of every group of layers of a recipe's model.

    Args:
        recipe: its weight grid is the reference; its overrides must be empty.
        settings: budgets, candidates, text and time.
        folder: measurements are kept here, and a search that was interrupted goes on.
        console: shows progress.

    Raises:
        UserError: for budgets that cannot be met, contradicting settings, or another search's folder.
    """
    started = time.monotonic()
    _check(recipe, settings)
    candidates = parse_candidates(settings.candidates, recipe)
    model = load_model(recipe.model).requires_grad_(False)
    groups = find_groups(model, recipe.quantization.skip, settings.fused)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(
        group.weights for group in groups
    )
    budgets = [make_budget(text, groups, candidates, others, settings.latency) for text in settings.budgets]
    solve(np.zeros((len(groups), len(candidates))), budgets)  # refuses contradicting budgets before the work
    data = recipe.data.model_copy(update={"block_size": settings.block_size})
    tokenizer = load_tokenizer(recipe.model)
    train = load_data(recipe.model_copy(update={"data": data}), tokenizer).train
    text = train[: settings.blocks]
    state = open_state(folder, _question(recipe, candidates, groups, text))
    deadline = started + settings.seconds - state.seconds

    total = len(candidates) * sum(len(group.layers) for group in groups)
    activations = recipe.quantization.activations
    with console.progress(total, "grids") as meter:
        switching = SwitchingModel(
            model, groups, candidates, activations.scheme if activations else None, meter.update
        )
    divergence = Divergence(switching, text)
    reference = [0] * len(groups)
    reference_value = divergence.set_reference(reference)
    state.remember(reference, reference_value)

    def until(share: float) -> float:
        return started + share * (deadline - started)

    estimates = _estimate(divergence, reference, budgets, settings, state, console)
    _measure(divergence, reference, estimates["slope"], budgets, state, console, until(_MEASURING_SHARE))
    costs = _costs(groups, candidates, reference, reference_value, estimates["slope"], state)

    def measure(choice: list[int]) -> float:
        known = state.assignment(choice)
        if known is None:
            known = divergence.measure(choice)
            state.remember(choice, known)
        return known

    answers = {"divergence": solve(costs, budgets)}
    answers |= {name: solve(estimate, budgets) for name, estimate in estimates.items()}
    measure(answers["divergence"])
    with console.progress(costs.size - len(groups), "around the answer") as meter:
        around = second_round(
            divergence, costs, answers["divergence"], state, until(_ROUND_SHARE), meter.update
        )
    both = (costs + around) / 2
    answers |= {"second round": solve(around, budgets), "both rounds": solve(both, budgets)}
    rivals = {name: measure(choice) for name, choice in answers.items()}
    with console.progress(settings.trials, "refining") as meter:
        refine(both, budgets, measure, settings.trials, recipe.seed, until(_REFINING_SHARE), meter.update)
    judging = Divergence(switching, judging_text(train, settings.blocks))
    entries = finalists(answers, state, budgets)
    with console.progress(len(entries), "finals") as meter:
        finals = judge(judging, entries, state, deadline, meter.update)
    (recipe_itself,) = judge(judging, [("recipe", reference)], state)
    return _result(groups, candidates, budgets, recipe_itself, costs, estimates, rivals, finals, state)


def _check(recipe: Recipe, settings: SearchSettings) -> None:
    if not settings.budgets:
        raise UserError("a search needs a budget, such as --budget average_bits=4.25")
    for text in settings.budgets:
        parse_budget(text)
    for name in settings.measures:
        if name not in MEASURES:
            raise UserError(f"--measures {name!r} is not one of {', '.join(MEASURES)}")
    if recipe.quantization.overrides:
        raise UserError(
            "quantization.overrides is set: a search writes that field; remove it from the recipe first"
        )
    for name, value in (
        ("blocks", settings.blocks),
        ("block size", settings.block_size),
        ("seconds", settings.seconds),
    ):
        if value <= 0:
            raise UserError(f"--{name.replace(' ', '-')} {value} must be positive")


def _question(
    recipe: Recipe, candidates: Sequence[Candidate], groups: Sequence[Group], text: torch.Tensor
) -> dict:
    activations = recipe.quantization.activations
    return {
        "model": recipe.model.model_dump(mode="json"),
        "candidates": [candidate.scheme.model_dump(mode="json") for candidate in candidates],
        "activations": describe(activations) if activations else None,
        "groups": [group.name for group in groups],
        "text": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }


def _estimate(
    divergence: Divergence,
    reference: list[int],
    budgets: Sequence[Budget],
    settings: SearchSettings,
    state: SearchState,
    console: Console,
) -> dict[str, NDArray[np.float64]]:
    """Every estimate that the state does not hold yet."""
    blocks = len(divergence.text)
    for name in ("slope", *settings.measures):
        if name in state.estimates:
            continue
        console.stage("estimate", name)
        if name == "slope":
            found = slope_costs(divergence, reference)
        elif name == "fisher":
            with console.progress(blocks, "fisher") as meter:
                found = fisher_costs(divergence, meter.update)
        elif name == "hessian":
            found = hessian_costs(divergence)
        else:
            with console.progress(settings.learning_steps, "learning") as meter:
                found = learned_costs(
                    divergence, reference, budgets, settings.learning_steps, on_progress=meter.update
                )
        state.estimates[name] = found.tolist()
        state.save()
    return {name: np.array(state.estimates[name]) for name in ("slope", *settings.measures)}


def _measure(
    divergence: Divergence,
    reference: list[int],
    slope: NDArray[np.float64],
    budgets: Sequence[Budget],
    state: SearchState,
    console: Console,
    deadline: float,
) -> None:
    """Measure single changes, those first that promise most for what they use of the budget."""
    switching = divergence.switching
    use = budgets[0].usage
    gain_density = np.abs(slope) / np.maximum(np.abs(use - use[:, :1]), 1e-12)
    names = [[f"{g.name}|{c.name}" for c in switching.candidates] for g in switching.groups]
    pairs = [
        (i, j)
        for i, j in sorted(np.ndindex(*slope.shape), key=lambda pair: -gain_density[pair])
        if j != reference[i] and names[i][j] not in state.changes
    ]
    with console.progress(len(pairs), "measuring") as meter:
        for done, (i, j, value) in enumerate(measured_changes(divergence, reference, pairs)):
            state.changes[names[i][j]] = value
            state.save()
            meter.update(done + 1, kl=value)
            if time.monotonic() > deadline:
                break


def _costs(
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    reference: Sequence[int],
    reference_value: float,
    slope: NDArray[np.float64],
    state: SearchState,
) -> NDArray[np.float64]:
    """Change of the divergence by each choice: measured, or the scaled slope where time ran out."""
    costs = np.full(slope.shape, np.nan)
    for i, group in enumerate(groups):
        costs[i, reference[i]] = 0.0
        for j, candidate in enumerate(candidates):
            value = state.changes.get(f"{group.name}|{candidate.name}")
            if value is not None:
                costs[i, j] = value - reference_value
    known = np.isfinite(costs) & (slope != 0)
    square = float((slope[known] ** 2).sum())
    factor = float((costs[known] * slope[known]).sum()) / square if square > 0 else 1.0
    return np.where(np.isfinite(costs), costs, max(factor, 0.0) * slope)


def _result(
    groups: list[Group],
    candidates: list[Candidate],
    budgets: list[Budget],
    recipe: Finalist,
    costs: NDArray[np.float64],
    estimates: dict[str, NDArray[np.float64]],
    rivals: dict[str, float],
    finals: list[Finalist],
    state: SearchState,
) -> SearchResult:
    rows, best = np.arange(len(groups)), finals[0]
    front = [(budgets[0].used(choice), found, True) for choice, found in state.measured()]
    for _, choice in frontier(costs, budgets[0]):
        front.append((budgets[0].used(choice), recipe.divergence + float(costs[rows, choice].sum()), False))
    return SearchResult(
        groups=groups,
        candidates=candidates,
        budgets=budgets,
        reference=recipe.choice,
        choice=best.choice,
        divergence=best.divergence,
        reference_divergence=recipe.divergence,
        judged=best.judged,
        reference_judged=recipe.judged,
        predicted=recipe.divergence + float(costs[rows, best.choice].sum()),
        costs=costs,
        estimates=estimates,
        rivals=rivals,
        finals=finals,
        front=front,
        measured_changes=len(state.changes),
        seconds=state.seconds,
    )
