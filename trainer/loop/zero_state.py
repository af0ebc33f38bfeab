"""DeepSpeed's partitioned weights and optimizer states, by parameter name.

ZeRO-1 and 2 flatten each group of parameters, cut it into equal parts and keep one on each process, so a parameter may
lie on several; ZeRO-3 cuts every parameter into equal parts. Both keep fp32 weights and moments in flat tensors, whose
ranges are what is saved and loaded. Weights that do not train are whole on every process under ZeRO-1 and 2, and cut
like the others under ZeRO-3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qatapult.trainer.loop.fragments import Fragment
from qatapult.trainer.loop.training_state import EngineState, persistent_buffers
from qatapult.trainer.recipe.errors import UserError


def zero_state(accelerator: Accelerator, model: nn.Module) -> EngineState:
    """The state of a DeepSpeed engine.

    Raises:
        UserError: without ZeRO, or with states on NVMe.
    """
    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    replica = (accelerator.process_index, accelerator.num_processes)
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise UserError(
            "DeepSpeed keeps states on NVMe, which checkpoints cannot read; offload to `cpu` instead"
        )
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Zero3State(optimizer, model, replica)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return Zero12State(optimizer, model, replica)
    raise UserError("checkpoints under DeepSpeed need zero_optimization.stage 1, 2 or 3")


@dataclass(frozen=True)
class _Range:
    """Where a parameter's part lies: elements of the parameter, and of the process's flat tensor."""

    start: int
    length: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The part's range in a tensor that is laid out like the flat weights."""
        return flat.detach().narrow(0, self.offset, self.length)


class _ZeroState(ABC):
    """What all stages have in common: names, and states of flat tensors.

    Args:
        optimizer: DeepSpeed's.
        model: inside the engine.
        replica: this process, and how many there are.
    """

    def __init__(self, optimizer: Any, model: nn.Module, replica: tuple[int, int]) -> None:
        self._optimizer = optimizer
        self._model = model
        self._replica = replica

    @abstractmethod
    def settle(self) -> None:
        """See `EngineState`."""

    @abstractmethod
    def _range(self, parameter: nn.Parameter) -> _Range | None:
        """The part of a trained parameter on this process, if it has any."""

    @abstractmethod
    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """This process's flat tensors, each with all parameters of its group."""

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def _frozen(self, name: str, parameter: nn.Parameter) -> Fragment:
        return Fragment(name, tuple(parameter.shape), 0, parameter.detach().view(-1), self._replica)

    def weights(self) -> list[Fragment]:
        """See `EngineState`."""
        trained = [
            Fragment(name, self._shape(parameter), part.start, part.of(part.flat))
            for name, parameter, part in self._parts()
        ]
        frozen = [self._frozen(name, p) for name, p in self._model.named_parameters() if not p.requires_grad]
        buffers = [
            Fragment(name, tuple(buffer.shape), 0, buffer.view(-1), self._replica)
            for name, buffer in persistent_buffers(self._model)
        ]
        return [*trained, *frozen, *buffers]

    def moments(self) -> list[Fragment]:
        """See `EngineState`."""
        return [
            Fragment(f"{name}/{entry}", self._shape(parameter), part.start, part.of(value))
            for name, parameter, part in self._parts()
            for entry, value in self._state(part.flat).items()
            if isinstance(value, Tensor) and value.shape == part.flat.shape
        ]

    def create_moments(self, names: set[str]) -> None:
        """See `EngineState`."""
        entries = {name.rpartition("/")[2] for name in names}
        for flat, _ in self._flats():
            state = self._state(flat)
            for entry in entries:
                if entry in state:
                    state[entry].zero_()
                else:
                    state[entry] = torch.zeros_like(flat, requires_grad=False)

    def steps(self) -> dict[str, float]:
        """See `EngineState`."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        return {
            names[id(parameter)]: float(self._state(flat)["step"])
            for flat, parameters in self._flats()
            for parameter in parameters
            if "step" in self._state(flat)
        }

    def set_steps(self, steps: dict[str, float]) -> None:
        """See `EngineState`. A flat tensor has one number: that of its parameter with the most steps."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for flat, parameters in self._flats():
            most = max((steps.get(names[id(parameter)], 0.0) for parameter in parameters), default=0.0)
            # DeepSpeed's own optimizers for the CPU count in Python.
            torchs = isinstance(self._optimizer.optimizer, torch.optim.AdamW)
            self._state(flat)["step"] = torch.tensor(most, device=flat.device) if torchs else int(most)

    def _parts(self) -> Iterator[tuple[str, nn.Parameter, _Range]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and (part := self._range(parameter)) is not None and part.length:
                yield name, parameter, part

    def _state(self, flat: Tensor) -> dict[str, Any]:
        return self._optimizer.optimizer.state[flat]


class Zero12State(_ZeroState):
    """ZeRO-1 and 2."""

    def settle(self) -> None:
        """See `EngineState`."""
        self._optimizer.update_lp_params()

    def _range(self, parameter: nn.Parameter) -> _Range | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        of_parameter, of_flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return _Range(of_parameter.start, of_parameter.numel, flat, of_flat.start)

    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        groups = zip(
            self._optimizer.single_partition_of_fp32_groups, self._optimizer.bit16_groups, strict=True
        )
        return [(flat, list(parameters)) for flat, parameters in groups]


class Zero3State(_ZeroState):
    """ZeRO-3; a parameter's own tensor is empty between two steps, and `ds_…` attributes describe it."""

    def settle(self) -> None:
        """See `EngineState`."""
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # lets the old values go
        for index, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            self._optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        if persistent:
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()

    def _range(self, parameter: nn.Parameter) -> _Range | None:
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start, length = self._own(parameter)
        return _Range(start, length, self._optimizer.fp32_partitioned_groups_flat[group], offset)

    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        groups = zip(self._optimizer.fp32_partitioned_groups_flat, self._optimizer.fp16_groups, strict=True)
        return [(flat, list(parameters)) for flat, parameters in groups]

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # type: ignore[attr-defined]

    def _frozen(self, name: str, parameter: nn.Parameter) -> Fragment:
        start, length = self._own(parameter)
        part = parameter.ds_tensor.detach().view(-1).narrow(0, 0, length)  # type: ignore[attr-defined]
        return Fragment(name, self._shape(parameter), start, part)

    @staticmethod
    def _own(parameter: Any) -> tuple[int, int]:
        """Start and length of a parameter's part on this process; the last parts may be padding."""
        size = parameter.partition_numel()
        start = min(size * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)
