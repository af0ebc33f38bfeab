"""Block by block from disk: the memory of one block, whatever the size of the model.

Blocks of the quantized and of the full-precision model are read one at a time from safetensors files, and the
activations between blocks lie in memory-mapped files in the run's folder: one GPU can train the blocks of a model that
would not fit it ten times over. A finished block is written with the activations that it gives, so a run that was
killed goes on at the block where it stopped. The results are those of `blockwise`, which holds everything in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.loop.blockwise import describe, text_and_passes, train_block
from qatapult.trainer.loop.disk_space import require_disk_space
from qatapult.trainer.models import load_config
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.quantize.ptq.calibration import block_output, decoder_blocks, first_inputs
from qatapult.trainer.recipe.schema import Model, Recipe
from qatapult.trainer.run_folder import write_json
from qatapult.trainer.weight_files import WeightFiles

# Inputs and outputs of one block, of the quantized and of the exact model.
_FILES_AT_A_TIME = 4


def train_blockwise_from_disk(
    weights: Path,
    recipe: Recipe,
    train: Blocks,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> list[tuple[float, float]]:
    """Train the quantized linears of every block, first block to last, and leave them as files.

    Args:
        weights: safetensors file of the prepared model's tensors, as post-training quantization left it.
        recipe: as for `blockwise.train_blockwise`.
        train: token ids `[blocks, block_size]`.
        folder: of this phase; holds `block-<n>.safetensors` and, until the end, activations.
        device: where blocks are trained.
        say: where progress goes.

    Returns:
        For each block, the mean squared error before and after.

    Raises:
        UserError: if a file lacks tensors, or the disk has no room for the activations.
    """
    text, passes = text_and_passes(train, recipe)
    student = _Side(_skeleton(recipe, prepared=True), WeightFiles.single(weights), device)
    exact = _Side(_skeleton(recipe, prepared=False), WeightFiles.of(recipe.model, folder / "source"), device)
    done = _progress(folder)
    count = len(student.blocks)
    store = _Store(folder, device, recipe.qat.batch_size)
    arguments = [
        store.begin(side, name, text, len(done)) for side, name in ((student, "student"), (exact, "exact"))
    ]
    for index in range(len(done), count):
        store.pass_through(exact, "exact", index, arguments[1])
        with student.loaded(index) as block:
            inputs, targets = store.rows("student", index), store.rows("exact", index + 1)
            done.append(train_block(block, inputs, targets, arguments[0], recipe, passes))
            _save_block(folder, index, block)
        if index + 1 < count:
            store.pass_through(student, "student", index, arguments[0], _trained(folder, index))
        write_json(folder / "progress.json", {"errors": done})
        store.forget(index)
        say(describe(index, count, done[-1]))
    store.forget(count)
    shutil.rmtree(folder / "source", ignore_errors=True)
    return done


@torch.no_grad()
def load_trained_blocks(model: PreTrainedModel, folder: Path) -> None:
    """Put the blocks that `train_blockwise_from_disk` left into a prepared model."""
    for index, block in enumerate(decoder_blocks(model)):
        block.load_state_dict(load_file(_block_file(folder, index)))


@dataclass
class _Side:
    """A model without memory, and the files its tensors are in."""

    model: PreTrainedModel
    files: WeightFiles
    device: torch.device

    @property
    def blocks(self) -> nn.ModuleList:
        return decoder_blocks(self.model)

    @contextmanager
    def loaded(self, index: int, tensors: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """A block with its tensors on the device as long as the context lasts."""
        with self._filled(self.blocks[index], tensors) as block:
            yield block

    def first_inputs(self, text: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the first block gets, with the embeddings loaded for as long as it takes."""
        with self._filled(self.model.get_input_embeddings(), None):
            return first_inputs(self.model, self.blocks[0], text.to(self.device))

    @contextmanager
    def _filled(self, module: nn.Module, tensors: dict[str, Tensor] | None) -> Iterator[nn.Module]:
        names = {inner: name for name, inner in self.model.named_modules()}
        if tensors is None:
            tensors = self.files.read(names[module], list(module.state_dict()))
        module.load_state_dict({name: t.float().to(self.device) for name, t in tensors.items()}, assign=True)
        try:
            yield module
        finally:
            module.to("meta")


class _Store:
    """Activations between blocks, a file for each side and block."""

    def __init__(self, folder: Path, device: torch.device, batch_size: int) -> None:
        self._folder, self._device, self._batch_size = folder / "activations", device, batch_size

    def begin(self, side: _Side, name: str, text: Tensor, done: int) -> dict[str, Any]:
        """Embed the text if the phase only begins; the other arguments that blocks are called with."""
        arguments: dict[str, Any]
        if done:
            _, arguments = side.first_inputs(text[:1])
            return arguments
        shape = (*text.shape, int(side.model.config.hidden_size))
        require_disk_space(self._folder, _FILES_AT_A_TIME * 4 * int(np.prod(shape)), "activations of a block")
        out = self._create(name, 0, shape)
        for start in range(0, len(text), self._batch_size):
            hidden, arguments = side.first_inputs(text[start : start + self._batch_size])
            out[start : start + len(hidden)] = hidden.float().cpu().numpy()
        out.flush()
        return arguments

    @torch.no_grad()
    def pass_through(
        self,
        side: _Side,
        name: str,
        index: int,
        arguments: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a block's outputs, the next block's inputs."""
        inputs = self.rows(name, index)
        out = self._create(name, index + 1, inputs.shape)
        with side.loaded(index, tensors) as block:
            for start in range(0, len(inputs), self._batch_size):
                rows = slice(start, start + self._batch_size)
                out[rows] = block_output(block, inputs[rows], arguments).float().cpu().numpy()
        out.flush()

    def rows(self, name: str, index: int) -> _DiskRows:
        """A block's inputs."""
        return _DiskRows(np.load(self._file(name, index), mmap_mode="r"), self._device)

    def forget(self, index: int) -> None:
        """Remove what only this block and those before it needed."""
        for file in self._folder.glob("*.npy"):
            if int(file.stem.rpartition("-")[2]) <= index:
                file.unlink()

    def _create(self, name: str, index: int, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self._file(name, index), mode="w+", dtype=np.float32, shape=shape)

    def _file(self, name: str, index: int) -> Path:
        return self._folder / f"{name}-{index:04d}.npy"


class _DiskRows:
    """Rows of a memory-mapped file as tensors on the device; see `blockwise.Rows`."""

    def __init__(self, stored: npt.NDArray[Any], device: torch.device) -> None:
        self._stored, self._device = stored, device
        self.shape: tuple[int, ...] = stored.shape

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return torch.from_numpy(np.array(self._stored[rows])).to(self._device)


def _skeleton(recipe: Recipe, prepared: bool) -> PreTrainedModel:
    """The model with its parameters on torch's meta device; buffers such as rotary frequencies are real."""
    source: Model = recipe.model
    config = load_config(source)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
        )
    if prepared:
        prepare(model, recipe.quantization, recipe.qat.method)
    return model.eval()


def _progress(folder: Path) -> list[tuple[float, float]]:
    file = folder / "progress.json"
    if not file.exists():
        return []
    return [(before, after) for before, after in json.loads(file.read_text(encoding="utf-8"))["errors"]]


def _save_block(folder: Path, index: int, block: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    building = _block_file(folder, index).with_suffix(".building")
    save_file({name: tensor.contiguous().cpu() for name, tensor in block.state_dict().items()}, building)
    building.replace(_block_file(folder, index))


def _trained(folder: Path, index: int) -> dict[str, Tensor]:
    return load_file(_block_file(folder, index))


def _block_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:04d}.safetensors"
