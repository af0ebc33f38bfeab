"""Safetensors shards and their index, written one tensor at a time."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class ShardWriter:
    """Appends tensors to shards of a limited size; nothing but the tensor at hand is held.

    The format (huggingface/safetensors, Format) puts the header first, so that a shard's data waits in files
    of its own, one for each item size: readers need every tensor aligned to its items.

    Args:
        folder: where `model*.safetensors` appear at `close`.
        shard_bytes: largest size of a shard, unless one tensor is larger.

    Attributes:
        metadata: strings for the header of the shards that are still to be finished.
    """

    def __init__(self, folder: Path, shard_bytes: int = 4 << 30) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._shards: list[_Shard] = []
        self.metadata: dict[str, str] = {"format": "pt"}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        size = tensor.numel() * tensor.element_size()
        if not self._shards or (self._shards[-1].size and self._shards[-1].size + size > self._limit):
            if self._shards:
                self._shards[-1].close(self.metadata)
            self._shards.append(_Shard(self._folder / f".shard-{len(self._shards)}"))
        self._shards[-1].add(name, tensor)

    def close(self) -> None:
        """Finish the last shard, give the shards their names, and write the index where there are several."""
        self._shards[-1].close(self.metadata)
        count = len(self._shards)
        where: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            shard.path.rename(self._folder / file)
            where |= dict.fromkeys(shard.names, file)
        if count > 1:
            index = {"metadata": {"total_size": sum(s.size for s in self._shards)}, "weight_map": where}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


class _Shard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.size = 0
        self._entries: dict[int, list[tuple[str, dict[str, Any], int]]] = {}
        self._bodies: dict[int, BinaryIO] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        width = tensor.element_size()
        if width not in self._bodies:
            self._bodies[width] = self.path.with_suffix(f".{width}").open("w+b")
            self._entries[width] = []
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._bodies[width].write(data.data)
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._entries[width].append((name, entry, len(data)))
        self.names.append(name)
        self.size += len(data)

    def close(self, metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        widths = sorted(self._bodies, reverse=True)
        for width in widths:
            for name, entry, size in self._entries[width]:
                header[name] = entry | {"data_offsets": [end, end + size]}
                end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for width in widths:
                body = self._bodies[width]
                body.seek(0)
                shutil.copyfileobj(body, file, 1 << 24)
                body.close()
                Path(body.name).unlink()
        self._bodies.clear()
