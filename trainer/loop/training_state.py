"""What a checkpoint holds, under names that mean the same on every engine and any number of processes.

An engine's weights and moments are views of its own memory (`Fragment`), so that the same list is saved from and
loaded into.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qatapult.trainer.loop.fragments import Fragment


class EngineState(Protocol):
    """Weights and optimizer of an engine, by parameter name."""

    def weights(self) -> list[Fragment]:
        """This process's part of every parameter (at the precision that the optimizer keeps) and buffer."""

    def moments(self) -> list[Fragment]:
        """This process's part of the optimizer's state, named `<parameter>/<entry>`."""

    def create_moments(self, names: set[str]) -> None:
        """Make room for the moments of these names, and set all others to zero: a step has yet to make them."""

    def steps(self) -> dict[str, float]:
        """Optimizer steps of each parameter that has moments."""

    def set_steps(self, steps: dict[str, float]) -> None:
        """Put them back; parameters without any begin at 0."""

    def settle(self) -> None:
        """After weights were loaded: bring the copies that the engine trains with up to date."""


def engine_state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> EngineState:
    """The state of whatever engine the accelerator runs.

    Args:
        accelerator: the engine.
        model: the model inside the engine's wrappers.
        optimizer: as the accelerator prepared it.

    Raises:
        UserError: for DeepSpeed settings whose state has no names.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from qatapult.trainer.loop.zero_state import zero_state

        return zero_state(accelerator, model)
    return PlainState(accelerator, model, optimizer.optimizer)


class PlainState:
    """One process, DDP and FSDP2, with torch's own optimizer.

    Args:
        accelerator: the engine.
        model: its parameters are tensors or DTensors.
        optimizer: torch's.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._replica = (accelerator.process_index, accelerator.num_processes)
        self._model = model
        self._optimizer = optimizer

    def weights(self) -> list[Fragment]:
        """See `EngineState`."""
        tensors = [*self._model.named_parameters(), *persistent_buffers(self._model)]
        return [self._fragment(name, tensor) for name, tensor in tensors]

    def moments(self) -> list[Fragment]:
        """See `EngineState`."""
        return [
            self._fragment(f"{name}/{entry}", value)
            for name, parameter in self._trained()
            for entry, value in self._optimizer.state[parameter].items()
            if entry != "step" and isinstance(value, Tensor)
        ]

    def create_moments(self, names: set[str]) -> None:
        """See `EngineState`."""
        for name, parameter in self._trained():
            state = self._optimizer.state[parameter]
            stored = {key.rpartition("/")[2] for key in names if key.rpartition("/")[0] == name}
            for entry in stored | (set(state) - {"step"}):
                state[entry] = torch.zeros_like(parameter, requires_grad=False)

    def steps(self) -> dict[str, float]:
        """See `EngineState`."""
        states = ((name, self._optimizer.state[parameter]) for name, parameter in self._trained())
        return {name: float(state["step"]) for name, state in states if "step" in state}

    def set_steps(self, steps: dict[str, float]) -> None:
        """See `EngineState`."""
        for name, parameter in self._trained():
            state = self._optimizer.state[parameter]
            if name in steps or "step" in state:
                # Where AdamW's fused form looks for it.
                state["step"] = torch.tensor(steps.get(name, 0.0), device=parameter.device)

    def settle(self) -> None:
        """See `EngineState`: there are none."""

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    def _fragment(self, name: str, tensor: Tensor) -> Fragment:
        if isinstance(tensor, DTensor):
            return _sharded_fragment(name, tensor)
        return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1), self._replica)


def _sharded_fragment(name: str, tensor: DTensor) -> Fragment:
    """A DTensor that is cut along its rows, perhaps with copies in other groups of processes (hybrid sharding)."""
    local = tensor.to_local().detach()
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    width = tensor.numel() // max(1, tensor.shape[0])
    index, count = 0, 1
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            index = index * mesh.size(dimension) + mesh.get_local_rank(dimension)
            count *= mesh.size(dimension)
    start = offset[0] * width if local.numel() else 0
    return Fragment(name, tuple(tensor.shape), start, local.view(-1), (index, count))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict has, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def random_states() -> dict[str, Any]:
    """States of this process's random generators, for JSON."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave; a GPU's state is left out on a CPU and the other way round."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_byte_tensor(states["torch"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(_byte_tensor(states["cuda"]))


def _byte_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
