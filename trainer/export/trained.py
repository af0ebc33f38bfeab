"""A trained model, read one layer at a time: exporting needs memory for a layer, not for the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.schema import QatMethod, Quantization


class TrainedModel:
    """The structure of a prepared model without memory, and its tensors where they are stored.

    Attributes:
        skeleton: the prepared model; its tensors may be on the `meta` device.
    """

    def __init__(self, skeleton: PreTrainedModel, names: set[str], read: Callable[[str], Tensor]) -> None:
        self.skeleton = skeleton
        self._names = names
        self._read = read

    @classmethod
    def in_memory(cls, model: PreTrainedModel) -> TrainedModel:
        """A prepared model that is loaded anyway."""
        tensors = model.state_dict()
        tied = tied_names(model)
        return cls(
            model, {name for name in tensors if name not in tied}, lambda name: tensors[name].detach().cpu()
        )

    @classmethod
    def stored(cls, config: Any, quantization: Quantization, method: QatMethod, file: Path) -> TrainedModel:
        """The tensors of a safetensors file, read when they are needed.

        Args:
            config: the model's transformers configuration.
            quantization: the grids that it was trained on.
            method: the training method, which decides which scales are stored.
            file: what the training stage left.
        """
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        prepare(skeleton, quantization, method)
        opened: AbstractContextManager[Any] = safe_open(file, framework="pt")
        handle = opened.__enter__()  # a memory map: closed with the process, its pages are the cache's
        return cls(skeleton, set(handle.keys()), handle.get_tensor)

    @property
    def config(self) -> Any:
        return self.skeleton.config

    def structure(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that `layers` yields, in its order, without loading anything."""
        for name, module in self.skeleton.named_modules():
            if any(_join(name, key) in self._names for key in _own_tensors(module)):
                yield name, module

    @torch.no_grad()
    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module that owns tensors, with its tensors loaded; each is freed when the next is asked for.

        Heads that are tied to the embeddings are left out.
        """
        for name, module in self.structure():
            keys = [key for key in _own_tensors(module) if _join(name, key) in self._names]
            tensors = {key: self._read(_join(name, key)) for key in keys}
            loaded = copy.copy(module)
            loaded._parameters, loaded._buffers = module._parameters.copy(), module._buffers.copy()
            loaded.load_state_dict(tensors, strict=False, assign=True)
            yield name, loaded.eval()


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of tensors that are another tensor under a second name."""
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _own_tensors(module: nn.Module) -> list[str]:
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    kept = [name for name in buffers if name not in module._non_persistent_buffers_set]
    return [name for name, _ in module.named_parameters(recurse=False)] + kept
