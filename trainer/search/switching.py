"""A model whose groups of layers switch between grids: round-to-nearest weights, quantized inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qatapult.kernels import Scheme, choose_range, dequantize, fake_quantize_dynamic, quantize
from qatapult.trainer.search.candidates import Candidate
from qatapult.trainer.search.groups import Group

#: Choice that leaves a group in full precision, inputs included.
FULL_PRECISION = -1
#: What `choice` says of a group whose weights are a mixture of candidates.
MIXED = -2


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
        self._layers = {name: model.get_submodule(name) for group in groups for name in group.layers}
        self._originals = {name: self.weight(name).detach().clone() for name in self._layers}
        self._codes: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor | None]] = {}
        for name, weight in self._originals.items():
            for index, candidate in enumerate(candidates):
                scheme = candidate.scheme.scheme
                scale, zero_point = choose_range(weight, scheme)
                self._codes[name, index] = (quantize(weight, scale, zero_point, scheme), scale, zero_point)
                if on_progress is not None:
                    on_progress(len(self._codes))
        self._quantizes_inputs = dict.fromkeys(self._layers, False)
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(self._input_hook(name))

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
            self._quantizes_inputs[name] = True
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
            full = candidate == FULL_PRECISION
            new = self._originals[name] if full else self.quantized(name, candidate)
            self.weight(name).data.copy_(new)
            self._quantizes_inputs[name] = not full
        self.choice[index] = candidate

    def weight(self, name: str) -> nn.Parameter:
        weight = self._layers[name].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def quantize_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.activations is None or not self._quantizes_inputs[name]:
                return None
            return (fake_quantize_dynamic(inputs[0], self.activations), *inputs[1:])

        return quantize_input
