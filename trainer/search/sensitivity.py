"""What each group loses on each candidate's grid, by three measures.

`divergence` is measured: the output's KL with one group switched, everything else on the recipe's grid.
`fisher` and `hessian` are second-order estimates around the full-precision model, each from a few passes for
all groups at once:

    fisher[g, c]  = ½ Σ_i F_ii (ΔW_i)²           F: diagonal of the Fisher information
    hessian[g, c] = ½ (tr H_g / weights) ‖ΔW‖²   tr H_g: Hutchinson's (HAWQ-V2, arXiv:1911.03852)

`slope` is the first-order estimate at the recipe's grid, ⟨∇KL, ΔW⟩, from a single backward pass; it orders
the measurements, so that a search that runs out of time has measured what matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from qatapult.trainer.search.divergence import Divergence
from qatapult.trainer.search.switching import FULL_PRECISION, SwitchingModel

Costs = NDArray[np.float64]
Progress = Callable[[int], None]


def fisher_costs(divergence: Divergence, on_progress: Progress | None = None) -> Costs:
    """Fisher-weighted squared error of every group on every candidate, in nats a token.

    The diagonal is that of the true Fisher information: labels are drawn from the model's own distribution.
        With
    independent draws the tokens' scores are uncorrelated, so that squaring a block's summed gradient is
    unbiased.

    Returns:
        `[groups, candidates]`.
    """
    switching = divergence.switching
    switching.set([FULL_PRECISION] * len(switching.groups))
    generator = torch.Generator(device=divergence.text.device).manual_seed(0)
    layers = [layer for group in switching.groups for layer in group.layers]
    fisher = {layer: torch.zeros_like(switching.original(layer)) for layer in layers}
    with searched_weights(switching) as weights:
        for done, row in enumerate(divergence.text):
            logits = divergence.model(input_ids=row[None], use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            gradients = torch.autograd.grad(
                cross_entropy(logits, labels, reduction="sum"), list(weights.values())
            )
            for layer, gradient in zip(weights, gradients, strict=True):
                fisher[layer].addcmul_(gradient, gradient)
            if on_progress is not None:
                on_progress(done + 1)
    tokens = divergence.text.numel()
    return _per_choice(
        switching, lambda layer, error: 0.5 * float((fisher[layer] * error.square()).sum()) / tokens
    )


def hessian_costs(divergence: Divergence, samples: int = 4, on_progress: Progress | None = None) -> Costs:
    """Average curvature times squared error of every group on every candidate, in nats a token.

    The Hessian is that of the divergence at the full-precision model. Hutchinson's estimate of a group's
    trace is the mean of zᵀ H z over random signs z; one product with H serves all groups, whose cross terms
    have mean zero.

    Args:
        divergence: supplies model, text and teacher.
        samples: random sign vectors, each on one block of text.
        on_progress: called with the number of samples done.

    Returns:
        `[groups, candidates]`.
    """
    switching = divergence.switching
    switching.set([FULL_PRECISION] * len(switching.groups))
    generator = torch.Generator().manual_seed(0)
    trace = dict.fromkeys([layer for group in switching.groups for layer in group.layers], 0.0)
    with searched_weights(switching) as weights, sdpa_kernel(SDPBackend.MATH):
        for sample in range(samples):
            row = sample % len(divergence.text)
            loss = divergence.differentiable(slice(row, row + 1))
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            signs = [
                (torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1).to(weight)
                for weight in weights.values()
            ]
            product = torch.stack(
                [(gradient * sign).sum() for gradient, sign in zip(gradients, signs, strict=True)]
            ).sum()
            curved = torch.autograd.grad(product, list(weights.values()))
            for layer, sign, value in zip(weights, signs, curved, strict=True):
                trace[layer] += float((sign * value).sum()) / samples
            if on_progress is not None:
                on_progress(sample + 1)
    return _per_choice(
        switching,
        lambda layer, error: 0.5 * max(trace[layer], 0.0) / error.numel() * float(error.square().sum()),
    )


def slope_costs(divergence: Divergence, reference: Sequence[int]) -> Costs:
    """First-order change of the divergence when one group leaves the reference assignment, in nats a token.

    Returns:
        `[groups, candidates]`, zero for the reference's own candidate.
    """
    switching = divergence.switching
    switching.set(reference)
    with searched_weights(switching) as weights:
        total = [torch.zeros_like(weight) for weight in weights.values()]
        for row in range(len(divergence.text)):
            loss = divergence.differentiable(slice(row, row + 1))
            for part, gradient in zip(total, torch.autograd.grad(loss, list(weights.values())), strict=True):
                part += gradient / len(divergence.text)
        slopes = dict(zip(weights, total, strict=True))
    costs = np.zeros((len(switching.groups), len(switching.candidates)))
    for i, group in enumerate(switching.groups):
        for j in range(len(switching.candidates)):
            for layer in group.layers:
                change = switching.quantized(layer, j) - switching.quantized(layer, reference[i])
                costs[i, j] += float((slopes[layer] * change).sum())
    return costs


def measured_changes(
    divergence: Divergence, reference: Sequence[int], order: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, float]]:
    """Measure the divergence with one group switched, one pair of group and candidate after the other.

    Args:
        divergence: with this reference set.
        reference: candidate of every group.
        order: pairs (group, candidate) to measure.

    Yields:
        `(group, candidate, divergence in nats a token)`.
    """
    for group, candidate in order:
        choice = list(reference)
        choice[group] = candidate
        yield group, candidate, divergence.measure(choice)


def _per_choice(switching: SwitchingModel, cost: Callable[[str, Tensor], float]) -> Costs:
    """Sum of a cost of the layers' weight errors, `[groups, candidates]`."""
    costs = np.zeros((len(switching.groups), len(switching.candidates)))
    for i, group in enumerate(switching.groups):
        for j in range(len(switching.candidates)):
            for layer in group.layers:
                costs[i, j] += cost(layer, switching.quantized(layer, j) - switching.original(layer))
    return costs


@contextmanager
def searched_weights(switching: SwitchingModel) -> Iterator[dict[str, nn.Parameter]]:
    """Within it the searched weights, by layer, have gradients, and no other parameter has."""
    wanted = {layer: switching.weight(layer) for group in switching.groups for layer in group.layers}
    before = {parameter: parameter.requires_grad for parameter in switching.model.parameters()}
    try:
        switching.model.requires_grad_(False)
        for weight in wanted.values():
            weight.requires_grad_(True)
        yield wanted
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
