"""Teacher logits on disk: the likeliest tokens of every position, and the probability of all others together.

A cache is a folder of shards (safetensors), their checksums and a manifest. Shards are written atomically, each by
one process under a lock, so that writing can be interrupted, resumed and shared among any processes that see the
folder; any number of processes read it. Log-probabilities are stored in fp16 and token ids in 16 or 32 bits: 64
tokens of a vocabulary up to 65,536 take 2,080 bits a token, and `top_p` takes as many as the text needs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.distill.entries import (
    Entries,
    bits_per_entry,
    decode_block,
    encode,
    joined,
    likeliest,
    stacked,
)
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_atomically, write_json

_MANIFEST = "cache.json"
# Bits of a position besides its kept tokens: the tail, and with top-p their number.
_TAIL_BITS, _COUNT_BITS = 32, 32


@dataclass(frozen=True)
class CacheFormat:
    """What a cache holds.

    Attributes:
        fingerprint: of the tokens it belongs to.
        teacher: source of the teacher.
        blocks: training blocks.
        block_size: tokens a block.
        vocabulary: tokens of the vocabulary.
        k: most tokens kept at a position.
        temperature: at which the probabilities were taken.
        shard_blocks: blocks a shard.
        top_p: share of the probability after which no more tokens are kept; None keeps k everywhere.
    """

    fingerprint: str
    teacher: str
    blocks: int
    block_size: int
    vocabulary: int
    k: int
    temperature: float = 1.0
    shard_blocks: int = 64
    top_p: float | None = None

    @property
    def shards(self) -> int:
        return -(-self.blocks // self.shard_blocks)

    @property
    def most_bits_per_token(self) -> int:
        """Stored bits of a position that keeps k tokens; with top-p most positions take fewer."""
        more = 0 if self.top_p is None else _COUNT_BITS
        return self.k * bits_per_entry(self.vocabulary) + _TAIL_BITS + more


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
    own = range(rank, layout.shards, world_size)
    for shard in own:
        part = blocks[shard * layout.shard_blocks : (shard + 1) * layout.shard_blocks]
        with _locked(folder, shard):
            if not _is_whole(folder, shard):
                batches = part.split(batch_size)
                entries = [
                    likeliest(teacher, ids, layout.k, layout.temperature, layout.top_p) for ids in batches
                ]
                _write_shard(folder, shard, layout, joined(entries))
        done += len(part)
        if on_progress:
            on_progress(done)


class CachedTeacher:
    """Reads what `write_cache` wrote; see `teacher.Teacher`.

    Args:
        folder: the cache.
        fingerprint: of the tokens that will be trained on.
        temperature: of the distillation.
        device: where the signal is needed.
        rank: this process, which verifies every `world_size`-th shard.
        world_size: how many processes read.

    Raises:
        UserError: if the cache is unfinished, damaged, or of other data.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        temperature: float,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.layout = check_fits(folder, fingerprint, temperature)
        verify_cache(folder, rank, world_size)
        self.folder = folder
        self.device = device

    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """The stored logits of these blocks; `−1` (no block) gets those of block 0, which nobody counts."""
        entries = stacked([self._block(max(0, int(block))) for block in blocks])
        return TeacherSignal(
            top_indices=entries.indices.to(self.device),
            top_logprobs=entries.logprobs.to(self.device),
            tail_mass=entries.tail.to(self.device),
        )

    def kept_tokens(self, block: int) -> float:
        """Mean number of tokens kept at a position of a block."""
        counts = self._block(block).counts
        return float(self.layout.k) if counts is None else counts.double().mean().item()

    def _block(self, block: int) -> Entries:
        shard, place = divmod(block, self.layout.shard_blocks)
        return decode_block(_open(str(_shard_file(self.folder, shard))), place)


def read_layout(folder: Path) -> CacheFormat:
    """What a cache holds.

    Raises:
        UserError: if the folder is no cache.
    """
    manifest = folder / _MANIFEST
    if not manifest.exists():
        raise UserError(f"{folder} holds no teacher cache; write one with `qatapult teacher cache`")
    return CacheFormat(**json.loads(manifest.read_text(encoding="utf-8")))


def check_fits(folder: Path, fingerprint: str, temperature: float) -> CacheFormat:
    """What a cache holds, if it was written for these tokens and this temperature.

    Raises:
        UserError: if the folder is no cache, or one of something else.
    """
    layout = read_layout(folder)
    if layout.fingerprint != fingerprint:
        raise UserError(
            f"qat.distillation.cache {folder}: was written for other tokens; write it for this recipe"
        )
    if layout.temperature != temperature:
        raise UserError(
            f"qat.distillation.cache {folder}: was written at temperature {layout.temperature:g}, "
            f"the recipe asks for {temperature:g}"
        )
    return layout


def verify_cache(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare every `world_size`-th shard with its checksum.

    Raises:
        UserError: naming the first shard that is missing or damaged.
    """
    for shard in range(rank, read_layout(folder).shards, world_size):
        file = _shard_file(folder, shard)
        if not _checksum_file(folder, shard).exists() or not file.exists():
            raise UserError(
                f"{file} is missing; run `qatapult teacher cache` again, it goes on where it stopped"
            )
        if not _is_whole(folder, shard):
            raise UserError(
                f"{file} is damaged; run `qatapult teacher cache` again, it writes this shard anew"
            )


def stored_bits_per_token(folder: Path) -> float:
    """Bits on disk for each token, headers and checksums included."""
    layout = read_layout(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".lock")
    return 8 * size / (layout.blocks * layout.block_size)


def _start(folder: Path, layout: CacheFormat, rank: int) -> None:
    manifest = folder / _MANIFEST
    if manifest.exists() and read_layout(folder) != layout:
        raise UserError(f"{folder} holds the cache of another teacher, text, k or p; choose another folder")
    if rank == 0 and not manifest.exists():
        write_json(manifest, asdict(layout))
    folder.mkdir(parents=True, exist_ok=True)


def _write_shard(folder: Path, shard: int, layout: CacheFormat, entries: Entries) -> None:
    file, checksum = _shard_file(folder, shard), _checksum_file(folder, shard)
    checksum.unlink(missing_ok=True)
    building = file.with_suffix(".building")
    save_file(encode(entries, layout.vocabulary), str(building))
    building.replace(file)
    # Last, so that a shard with a checksum is a whole one.
    write_atomically(checksum, _checksum(file) + "\n")


def _is_whole(folder: Path, shard: int) -> bool:
    file, checksum = _shard_file(folder, shard), _checksum_file(folder, shard)
    if not (file.exists() and checksum.exists()):
        return False
    return _checksum(file) == checksum.read_text(encoding="utf-8").strip()


@contextmanager
def _locked(folder: Path, shard: int) -> Iterator[None]:
    """Two jobs that write the same cache do not write the same shard at once."""
    with (folder / f"shard-{shard:06d}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
