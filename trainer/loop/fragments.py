"""Pieces of tensors on disk: what each process holds, under the tensor's name, in safetensors files.

Every engine cuts tensors in another way, but always along the flattened tensor: DDP not at all, FSDP2 by rows, ZeRO-1
and 2 wherever a process's share of the flattened group begins, ZeRO-3 into equal parts. So a piece is a range of the
flattened tensor, and whoever wants another range puts it together from the pieces that cover it.

Files are safetensors and nothing is pickled, which torch's distributed checkpoints would do; the header's
`__metadata__` says which range of which shape each piece is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qatapult.trainer.recipe.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened tensor.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor.
        start: first element of the range.
        values: `[n]`, a view of the memory that is saved from and loaded into.
        replica: which of how many processes that hold the same range this one is.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    replica: tuple[int, int] = (0, 1)

    def share(self) -> Fragment:
        """What this replica writes: replicas write an equal part of their range each."""
        index, count = self.replica
        length = self.values.numel()
        first, end = length * index // count, length * (index + 1) // count
        part = self.values.narrow(0, first, end - first)
        return replace(self, start=self.start + first, values=part, replica=(0, 1))

    def copied(self) -> Fragment:
        """The same in main memory, out of the reach of later steps."""
        return replace(self, values=self.values.detach().to("cpu", copy=True))


def write_fragments(path: Path, fragments: Sequence[Fragment]) -> str:
    """Write fragments to a safetensors file, one tensor after another in main memory, and flush it to the disk.

    Returns:
        The file's BLAKE2b checksum, taken while writing.
    """
    # Readers view the file as its dtype, so wide elements go first and everything is aligned.
    ordered = sorted(fragments, key=lambda fragment: -fragment.values.element_size())
    digest = hashlib.blake2b()
    with path.open("wb") as file:
        for piece in (_header(ordered), *(_bytes(fragment.values) for fragment in ordered)):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(fragments: Sequence[Fragment]) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {"ranges": json.dumps({f.name: [f.start, *f.shape] for f in fragments})}
    }
    offset = 0
    for fragment in fragments:
        size = fragment.values.numel() * fragment.values.element_size()
        header[fragment.name] = {
            "dtype": _DTYPES[fragment.values.dtype],
            "shape": [fragment.values.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(values: Tensor) -> bytes:
    # A copy: numpy's view makes a storage unresizable for good, and FSDP2 resizes those of its weights.
    return values.detach().to("cpu", copy=True).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    file: Any


class StoredTensors:
    """Whole tensors, or any range of them, from the fragments that all processes wrote.

    Args:
        files: what `write_fragments` wrote, one file a process.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for path in files:
            file = safe_open(path, "pt")
            for name, (start, *shape) in json.loads(file.metadata()["ranges"]).items():
                self.shapes[name] = tuple(shape)
                length = file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append(_Piece(start, start + length, file))

    def read_into(self, fragment: Fragment) -> None:
        """Fill a fragment's memory, casting to its dtype.

        Raises:
            UserError: if there is no such tensor of this shape, or no file has a part of the range.
        """
        name, end = fragment.name, fragment.start + fragment.values.numel()
        if self.shapes.get(name) != fragment.shape:
            stored = self.shapes.get(name, "none")
            raise UserError(
                f"the checkpoint's {name} has the shape {stored} and the model's {fragment.shape}: "
                "it belongs to another model or recipe"
            )
        covered = 0
        for piece in self._pieces[name]:
            first, last = max(piece.start, fragment.start), min(piece.end, end)
            if first < last:
                part = piece.file.get_slice(name)[first - piece.start : last - piece.start]
                fragment.values.narrow(0, first - fragment.start, last - first).copy_(part)
                covered += last - first
        if covered < fragment.values.numel():
            raise UserError(
                f"the checkpoint has only {covered} of {fragment.values.numel()} values of {name}"
            )

    def whole(self, name: str) -> Tensor:
        """A whole tensor in main memory, in the dtype that it was stored in."""
        shape = self.shapes[name]
        first = self._pieces[name][0]
        values = torch.empty(math.prod(shape), dtype=first.file.get_slice(name)[:0].dtype)
        self.read_into(Fragment(name, shape, 0, values))
        return values.view(shape)
