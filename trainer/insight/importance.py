"""How concentrated the importance of neurons is, and how many of them a model can lose.

A neuron here is a channel inside an MLP: an input of its last projection. Its importance is how much the loss
would change if it were switched off, to first order (Taylor: Molchanov et al., arXiv:1906.10771) and as the
Fisher information of a mask on it (Kwon et al., arXiv:2204.09656). Both are read off one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import last_hidden, perplexity

#: Shares of the neurons that the pruning experiment switches off, as long as there is still a model.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
# The experiment ends when the perplexity is so many times that of the whole model.
_RUINED = 3.0


def last_projections(model: nn.Module) -> list[str]:
    """Names of the MLPs' last projections, in the order of the model; empty where none is so named."""
    return [
        name
        for name, module in model.named_modules()
        if name.endswith("down_proj") and isinstance(module, nn.Linear)
    ]


def neuron_importance(
    model: PreTrainedModel,
    blocks: Tensor,
    names: Sequence[str],
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importance of every input of the named layers.

    Args:
        model: a causal language model, quantized or not; its parameters get no gradients.
        blocks: token ids, int64 `[blocks, S]`.
        names: layers whose inputs are the neurons.
        on_progress: called with the number of blocks done.

    Returns:
        Taylor importance and Fisher information, each fp64 `[K]` by layer, means over blocks.
    """
    widths = {name: model.get_parameter(f"{name}.weight").shape[1] for name in names}
    taylor = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}
    fisher = {name: torch.zeros_like(values) for name, values in taylor.items()}
    kept: dict[str, Tensor] = {}
    handles = [_keep_input(model.get_submodule(name), name, kept) for name in names]
    # Gradients of activations need a graph, and no parameter shall get one: it begins at the embeddings.
    handles.append(model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_()))
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for done, block in enumerate(blocks, start=1):
            _loss(model, block[None].to(model.device)).backward()
            for name, x in kept.items():
                assert x.grad is not None
                effect = (x.detach().double() * x.grad.double()).flatten(0, -2).sum(dim=0).cpu()
                taylor[name] += effect.abs() / len(blocks)
                fisher[name] += effect.square() / len(blocks)
            if on_progress:
                on_progress(done)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
    return taylor, fisher


def gini(values: Tensor) -> float:
    """Gini coefficient: 0 if all are equally important, towards 1 if one has everything."""
    ordered = values.double().sort().values
    count = len(ordered)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    whole = ordered.sum()
    return float((2 * (ranks * ordered).sum() / whole - (count + 1)) / count) if whole > 0 else 0.0


def top_share(values: Tensor, share: float = 0.1) -> float:
    """Share of the whole importance that the most important `share` of the neurons has."""
    ordered = values.double().sort(descending=True).values
    return float(ordered[: max(1, round(share * len(ordered)))].sum() / ordered.sum().clamp(min=1e-300))


def pruned_perplexities(
    model: PreTrainedModel,
    blocks: Tensor,
    importance: Mapping[str, Tensor],
    shares: Sequence[float] = SHARES,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Perplexity with the least important neurons of every layer switched off.

    Ends early where the model is ruined: larger shares would say nothing more.

    Args:
        model: a causal language model, quantized or not.
        blocks: token ids, int64 `[blocks, S]`.
        importance: of the inputs of each layer, `[K]`.
        shares: shares of each layer's neurons to switch off, rising from 0.
        on_progress: called with the number of shares done.

    Returns:
        One for each share, the last ones left out where the model was ruined before.
    """
    results: list[float] = []
    documents = torch.zeros_like(blocks)
    for share in shares:
        masks = {name: _mask(values, share) for name, values in importance.items()}
        with _switched_off(model, masks):
            results.append(perplexity(model, blocks, documents).value)
        if on_progress:
            on_progress(len(results))
        if results[-1] > _RUINED * results[0]:
            break
    return results


def tolerated_share(shares: Sequence[float], perplexities: Sequence[float], rise: float) -> float:
    """Share of neurons that may go before the perplexity has risen by `rise` (0.05 is 5 %), interpolated."""
    limit = perplexities[0] * (1 + rise)
    for index in range(1, len(perplexities)):
        if perplexities[index] > limit:
            before, after = perplexities[index - 1], perplexities[index]
            part = (limit - before) / (after - before)
            return shares[index - 1] + part * (shares[index] - shares[index - 1])
    return shares[len(perplexities) - 1]


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    hidden = last_hidden(model, ids)[:, :-1].flatten(0, 1)
    return cross_entropy(model.get_output_embeddings()(hidden).float(), ids[:, 1:].flatten())


def _keep_input(layer: nn.Module, name: str, kept: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        kept[name] = inputs[0]

    return layer.register_forward_pre_hook(keep)


def _mask(importance: Tensor, share: float) -> Tensor:
    mask = torch.ones(len(importance), dtype=torch.bool)
    mask[importance.argsort()[: round(share * len(importance))]] = False
    return mask


@contextmanager
def _switched_off(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    handles = []
    for name, mask in masks.items():

        def switch(module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor = mask) -> tuple[Tensor]:
            return (inputs[0] * mask.to(inputs[0].device),)

        handles.append(model.get_submodule(name).register_forward_pre_hook(switch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
