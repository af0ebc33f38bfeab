"""Teacher logits on disk: the k most likely tokens of every position, and the probability of all others together.

A cache is a folder of shards (safetensors) and a manifest with checksums. Shards are written atomically, each by one
process, so that writing can be interrupted, resumed and shared among processes; any number of processes read it.
Log-probabilities are stored in fp16 and token ids in 16 or 32 bits: 64 tokens of a vocabulary up to 65,536 take
2,080 bits a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.evaluate.perplexity import last_hidden
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_json

_MANIFEST = "cache.json"
_CHUNK_TOKENS = 128
# Ids up to here fit 16 bits; torch has few operations on uint16, so they are stored shifted, as int16.
_SHORT_VOCABULARY = 2**16
_SHIFT = 2**15


@dataclass(frozen=True)
class CacheFormat:
    """What a cache holds.

    Attributes:
        fingerprint: of the tokens it belongs to.
        teacher: source of the teacher.
        blocks: training blocks.
        block_size: tokens a block.
        vocabulary: tokens of the vocabulary.
        k: tokens kept at each position.
        temperature: at which the probabilities were taken.
        shard_blocks: blocks a shard.
    """

    fingerprint: str
    teacher: str
    blocks: int
    block_size: int
    vocabulary: int
    k: int
    temperature: float = 1.0
    shard_blocks: int = 64

    @property
    def shards(self) -> int:
        return -(-self.blocks // self.shard_blocks)

    @property
    def bits_per_token(self) -> int:
        """Stored bits for each token: ids, log-probabilities and the tail."""
        return self.k * ((16 if self.vocabulary <= _SHORT_VOCABULARY else 32) + 16) + 32


def write_cache(
    folder: Path,
    layout: CacheFormat,
    teacher: PreTrainedModel,
    blocks: Blocks,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write this process's share of the shards; those that are there and whole are left alone.

    Args:
        folder: the cache.
        layout: what it holds.
        teacher: full precision, in evaluation mode.
        blocks: all training blocks, int64 `[blocks, block_size]`.
        rank: this process, which writes every `world_size`-th shard.
        world_size: how many processes write.
        batch_size: blocks at a time.
        on_progress: called with the number of this process's blocks done.

    Raises:
        UserError: if the folder holds a cache of something else.
    """
    _start(folder, layout, rank)
    done = 0
    for shard in range(rank, layout.shards, world_size):
        part = blocks[shard * layout.shard_blocks : (shard + 1) * layout.shard_blocks]
        if not _checksum_file(folder, shard).exists():
            entries = [top_k(teacher, ids, layout.k, layout.temperature) for ids in part.split(batch_size)]
            _write_shard(
                folder, shard, layout, *(torch.cat(tensors) for tensors in zip(*entries, strict=True))
            )
        done += len(part)
        if on_progress:
            on_progress(done)


@torch.no_grad()
def top_k(teacher: PreTrainedModel, ids: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's k most likely next tokens.

    Args:
        teacher: a causal language model.
        ids: int64 `[B, S]`.
        k: how many.
        temperature: divides the logits.

    Returns:
        Token ids int64 `[B, S, k]`, log-probabilities fp32 `[B, S, k]`, and the rest's probability fp32 `[B, S]`.
    """
    hidden = last_hidden(teacher, ids.to(teacher.device)).flatten(0, 1)
    head = teacher.get_output_embeddings()
    parts = []
    for rows in hidden.split(_CHUNK_TOKENS):
        logprobs = torch.log_softmax(head(rows).float() / temperature, dim=-1)
        values, indices = logprobs.topk(k, dim=-1)
        tail = (1 - values.double().exp().sum(-1)).clamp(min=0).float()
        parts.append((indices.cpu(), values.cpu(), tail.cpu()))
    indices, values, tail = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return indices.view(*ids.shape, k), values.view(*ids.shape, k), tail.view(ids.shape)


class CachedTeacher:
    """Reads what `write_cache` wrote; see `teacher.Teacher`.

    Args:
        folder: the cache.
        fingerprint: of the tokens that will be trained on.
        temperature: of the distillation.
        device: where the signal is needed.

    Raises:
        UserError: if the cache is unfinished, damaged, or of other data.
    """

    def __init__(self, folder: Path, fingerprint: str, temperature: float, device: torch.device) -> None:
        self.layout = read_layout(folder)
        if self.layout.fingerprint != fingerprint:
            raise UserError(
                f"qat.distillation.cache {folder}: was written for other tokens; write it for this recipe"
            )
        if self.layout.temperature != temperature:
            raise UserError(
                f"qat.distillation.cache {folder}: was written at temperature {self.layout.temperature:g}, "
                f"the recipe asks for {temperature:g}"
            )
        verify_cache(folder)
        self.folder = folder
        self.device = device

    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """The stored logits of these blocks; `−1` (no block) gets those of block 0, which nobody counts."""
        entries = [self._block(max(0, int(block))) for block in blocks]
        indices, logprobs, tail = (torch.stack(tensors) for tensors in zip(*entries, strict=True))
        if indices.dtype == torch.int16:
            indices = indices.int() + _SHIFT
        return TeacherSignal(
            top_indices=indices.long().to(self.device),
            top_logprobs=logprobs.float().to(self.device),
            tail_mass=tail.to(self.device),
        )

    def _block(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        shard, place = divmod(block, self.layout.shard_blocks)
        file = _open(str(_shard_file(self.folder, shard)))
        return tuple(file.get_slice(name)[place] for name in ("indices", "logprobs", "tail"))


def read_layout(folder: Path) -> CacheFormat:
    """What a cache holds.

    Raises:
        UserError: if the folder is no cache.
    """
    manifest = folder / _MANIFEST
    if not manifest.exists():
        raise UserError(f"{folder} holds no teacher cache; write one with `qatapult teacher cache`")
    return CacheFormat(**json.loads(manifest.read_text(encoding="utf-8")))


def verify_cache(folder: Path) -> None:
    """Compare every shard with its checksum.

    Raises:
        UserError: naming the first shard that is missing or damaged.
    """
    for shard in range(read_layout(folder).shards):
        file, checksum = _shard_file(folder, shard), _checksum_file(folder, shard)
        if not checksum.exists() or not file.exists():
            raise UserError(
                f"{file} is missing; run `qatapult teacher cache` again, it goes on where it stopped"
            )
        if _checksum(file) != checksum.read_text(encoding="utf-8").strip():
            raise UserError(
                f"{file} is damaged; remove it and {checksum.name}, and run `qatapult teacher cache` again"
            )


def _start(folder: Path, layout: CacheFormat, rank: int) -> None:
    manifest = folder / _MANIFEST
    if manifest.exists() and read_layout(folder) != layout:
        raise UserError(f"{folder} holds the cache of another teacher, text or k; choose another folder")
    if rank == 0 and not manifest.exists():
        write_json(manifest, asdict(layout))
    folder.mkdir(parents=True, exist_ok=True)


def _write_shard(
    folder: Path, shard: int, layout: CacheFormat, indices: Tensor, logprobs: Tensor, tail: Tensor
) -> None:
    short = layout.vocabulary <= _SHORT_VOCABULARY
    stored = (indices - _SHIFT).to(torch.int16) if short else indices.to(torch.int32)
    file = _shard_file(folder, shard)
    building = file.with_suffix(".building")
    save_file({"indices": stored, "logprobs": logprobs.half(), "tail": tail.contiguous()}, str(building))
    building.replace(file)
    # Last, so that a shard with a checksum is a whole one.
    _checksum_file(folder, shard).write_text(_checksum(file) + "\n", encoding="utf-8")


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.safetensors"


def _checksum_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.blake2b"


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


@lru_cache(maxsize=64)
def _open(file: str) -> safe_open:
    return safe_open(file, framework="pt")
