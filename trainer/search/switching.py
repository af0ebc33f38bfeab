"""A model whose groups of layers switch between grids: round-to-nearest weights, quantized inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qatapult.kernels import (
    PreparedWeight,
    Scheme,
    choose_range,
    dequantize,
    fake_quantize_dynamic,
    packed_linear,
    prepare_unpacked,
    quantize,
)
from qatapult.trainer.search.candidates import Candidate
from qatapult.trainer.search.groups import Group

#: Choice that leaves a group in full precision, inputs included.
FULL_PRECISION = -1
#: What `choice` says of a group whose weights are a mixture of candidates.
MIXED = -2


class SwitchingLinear(nn.Linear):
    """A linear layer whose weight holds the values of the grid in force.

    Attributes:
        inputs: grid of the inputs, or None while they stay in full precision.
        codes: the weight's codes, laid out for an integer product; None where there is no fast one.
    """

    inputs: Scheme | None
    codes: PreparedWeight | None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`: a product of integers where no gradient is wanted, some 4 × as fast."""
        if self.inputs is None:
            return super().forward(x)
        if self.codes is not None and not torch.is_grad_enabled():
            return packed_linear(x, self.codes, bias=self.bias, activation_scheme=self.inputs)
        return linear(fake_quantize_dynamic(x, self.inputs), self.weight, self.bias)


class SwitchingModel:
    """Holds a full-precision model and lays any group on any candidate's grid at once.

    Codes of every layer on every candidate are kept as int8, so that a switch costs one multiplication.

    Args:
        model: full-precision causal language model; its linear weights are replaced in place.
        groups: the decisions.
        candidates: the grids.
        activations: grid of the inputs of quantized layers, or None for weight-only quantization.
        on_progress: called with the number of layers and candidates laid out.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        candidates: Sequence[Candidate],
        activations: Scheme | None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.groups, self.candidates = model, list(groups), list(candidates)
        self.activations = activations
        self.choice = [FULL_PRECISION] * len(groups)
        self._layers = {name: _switching(model, name) for group in groups for name in group.layers}
        self._originals = {name: self.weight(name).detach().clone() for name in self._layers}
        self._codes: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor | None]] = {}
        for name, weight in self._originals.items():
            for index, candidate in enumerate(candidates):
                scheme = candidate.scheme.scheme
                scale, zero_point = choose_range(weight, scheme)
                self._codes[name, index] = (quantize(weight, scale, zero_point, scheme), scale, zero_point)
                if on_progress is not None:
                    on_progress(len(self._codes))

    @torch.no_grad()
    def set(self, choice: Sequence[int]) -> None:
        """Lay every group on its candidate; `FULL_PRECISION` restores the original."""
        for index, (old, new) in enumerate(zip(self.choice, choice, strict=True)):
            if old != new:
                self._switch(index, new)

    @torch.no_grad()
    def mix(self, index: int, shares: Sequence[float]) -> None:
        """Give a group the mean of its weights on all grids, in these shares; inputs are quantized."""
        for name in self.groups[index].layers:
            weight = self.weight(name).data.zero_()
            for candidate, share in enumerate(shares):
                weight.add_(self.quantized(name, candidate), alpha=share)
            self._layers[name].inputs, self._layers[name].codes = self.activations, None
        self.choice[index] = MIXED

    def original(self, layer: str) -> Tensor:
        """Full-precision weight of a layer, `[N, K]`."""
        return self._originals[layer]

    def quantized(self, layer: str, candidate: int) -> Tensor:
        """Weight of a layer on a candidate's grid, `[N, K]` in the model's dtype."""
        codes, scale, zero_point = self._codes[layer, candidate]
        scheme = self.candidates[candidate].scheme.scheme
        return dequantize(codes, scale, zero_point, scheme, dtype=self._originals[layer].dtype)

    def _switch(self, index: int, candidate: int) -> None:
        for name in self.groups[index].layers:
            layer = self._layers[name]
            full = candidate == FULL_PRECISION
            layer.weight.data.copy_(self._originals[name] if full else self.quantized(name, candidate))
            layer.inputs = None if full else self.activations
            layer.codes = None if full else self._prepared(name, candidate)
        self.choice[index] = candidate

    def _prepared(self, name: str, candidate: int) -> PreparedWeight | None:
        scheme, inputs = self.candidates[candidate].scheme.scheme, self.activations
        per_token = inputs is not None and inputs.granularity == "token" and inputs.range_method == "minmax"
        # By groups of weights the integer product is the slower one; so it is without VNNI.
        if not per_token or scheme.granularity == "group" or not torch.cpu._is_vnni_supported():
            return None
        return prepare_unpacked(*self._codes[name, candidate], scheme, inputs)

    def weight(self, name: str) -> nn.Parameter:
        """The weight in force of a layer, `[N, K]`."""
        weight = self._layers[name].weight
        assert isinstance(weight, nn.Parameter)
        return weight


def _switching(model: nn.Module, name: str) -> SwitchingLinear:
    """Turn a linear layer into a switching one, in place."""
    layer = model.get_submodule(name)
    layer.__class__ = SwitchingLinear
    assert isinstance(layer, SwitchingLinear)
    layer.inputs = layer.codes = None
    return layer
