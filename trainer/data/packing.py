"""Documents packed end to end into blocks, read from the token files when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qatapult.trainer.data.streams import Documents
from qatapult.trainer.recipe.errors import UserError


class Blocks(Protocol):
    """Blocks of token ids, indexed as an int64 tensor `[blocks, block_size]`: a tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


class PackedBlocks:
    """Documents of one source without gaps, cut into whole blocks.

    Args:
        documents: in the order of packing.
        block_size: tokens a block.
        role: what the text is for, as errors call it.

    Raises:
        UserError: if there is not one whole block.
    """

    def __init__(self, documents: Documents, block_size: int, role: str) -> None:
        total = int(documents.length.sum())
        if total < block_size:
            raise UserError(
                f"data: the {role} text has {total} tokens, less than one block of {block_size}; "
                "give more text or set a smaller data.block_size"
            )
        self.shape = (total // block_size, block_size)
        self._tokens = [file.tokens for file in documents.files]
        self._file, self._begin = documents.file, documents.begin
        self._ends = np.cumsum(documents.length)
        self._hashes = documents.hash

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int, /) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice | Tensor, /) -> Tensor: ...
    def __getitem__(self, index: int | slice | Tensor, /) -> Tensor:
        """Block `[block_size]`, or blocks `[n, block_size]`, int64."""
        return read_blocks(self, index)

    def block(self, number: int) -> npt.NDArray[Any]:
        """One block's tokens."""
        position, size = number * self.shape[1], self.shape[1]
        pieces, document = [], int(np.searchsorted(self._ends, position, side="right"))
        while size:
            start = position - (int(self._ends[document - 1]) if document else 0)
            count = min(size, int(self._ends[document]) - position)
            begin = int(self._begin[document]) + start
            pieces.append(self._tokens[self._file[document]][begin : begin + count])
            position, size, document = position + count, size - count, document + 1
        return np.concatenate(pieces)

    def owners(self, count: int) -> Tensor:
        """Index of the document of each token of the first blocks, int64 `[count, block_size]`."""
        positions = np.arange(count * self.shape[1])
        found = np.searchsorted(self._ends, positions, side="right")
        return torch.from_numpy(found).view(count, self.shape[1])

    def digest(self) -> bytes:
        """Of the documents' texts and lengths: equal for equal text, wherever its files lie."""
        content = hashlib.sha256(np.ascontiguousarray(self._hashes).tobytes())
        content.update(np.ascontiguousarray(self._ends).tobytes())
        return content.digest()


class MixedBlocks:
    """Blocks of several sources in the proportions of their weights, evenly interleaved; none comes twice.

    Args:
        parts: blocks of each source.
        weights: their weights; the source that is used up first limits all.
        fraction: share of the blocks to use, from the first on.
    """

    def __init__(
        self, parts: Sequence[PackedBlocks], weights: Sequence[float], fraction: float = 1.0
    ) -> None:
        whole = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        counts = [max(1, min(len(p), round(whole * w))) for p, w in zip(parts, weights, strict=True)]
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        source = np.repeat(np.arange(len(parts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort(places, kind="stable")
        order = order[: max(1, round(len(order) * fraction))]
        self._parts, self._source, self._within = parts, source[order], within[order]
        self.shape = (len(order), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor, /) -> Tensor:
        """As `PackedBlocks`."""
        return read_blocks(self, index)

    def block(self, number: int) -> npt.NDArray[Any]:
        """One block's tokens."""
        return self._parts[self._source[number]].block(int(self._within[number]))

    def digest(self) -> bytes:
        """Of the texts, and of which blocks of them are used."""
        content = hashlib.sha256(b"".join(part.digest() for part in self._parts))
        content.update(np.stack([self._source, self._within]).astype(np.int64).tobytes())
        return content.digest()


def read_blocks(blocks: PackedBlocks | MixedBlocks, index: int | slice | Tensor) -> Tensor:
    """Index blocks as a tensor: an integer, a slice, or a tensor of integers."""
    if isinstance(index, int):
        return torch.from_numpy(blocks.block(range(len(blocks))[index]).astype(np.int64))
    wanted = range(len(blocks))[index] if isinstance(index, slice) else [range(len(blocks))[i] for i in index]
    if not wanted:
        return torch.empty((0, blocks.shape[1]), dtype=torch.int64)
    return torch.from_numpy(np.stack([blocks.block(number) for number in wanted]).astype(np.int64))
