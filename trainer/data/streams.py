"""Which documents of a source a run reads, and the stream of tokens that they are packed into.

A source is read shard by shard. A streamed one gives every shard in use the same share of the tokens that are needed,
so that shards can be tokenized by different processes and no process has to know what another one found; the choice
follows from the source and the number of tokens alone, so every number of processes sees the same text.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import shards_of, warn_of_broken
from qatapult.trainer.data.token_files import TokenFile
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import DataSource

# A stream takes at least so many tokens of a shard before it opens another one.
_LEAST_SHARE = 2**20


@dataclass(frozen=True)
class Documents:
    """Documents in token files: one entry each, in order.

    Attributes:
        files: the token files.
        file: int64 `[n]`, index of a document's file.
        begin: int64 `[n]`, where its tokens begin there.
        length: int64 `[n]`, how many.
        hash: uint64 `[n]`, of its text.
        place: int64 `[n]`, its position, by which the held-out ones are chosen.
    """

    files: tuple[TokenFile, ...]
    file: npt.NDArray[Any]
    begin: npt.NDArray[Any]
    length: npt.NDArray[Any]
    hash: npt.NDArray[Any]
    place: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.begin)

    def select(self, which: npt.NDArray[Any]) -> Documents:
        """Those at the given indices, or for which a mask is True."""
        picked = (array[which] for array in (self.file, self.begin, self.length, self.hash, self.place))
        return Documents(self.files, *picked)

    def mixed(self, buffer: int) -> Documents:
        """In the order in which a shuffle buffer of so many documents gives them; always the same."""
        if buffer < 2:
            return self
        draw, held, order = random.Random(0), list(range(min(buffer, len(self)))), []
        for arriving in range(len(held), len(self)):
            place = draw.randrange(buffer)
            order.append(held[place])
            held[place] = arriving
        draw.shuffle(held)
        return self.select(np.array([*order, *held], dtype=np.int64))


def gather(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    needed: float = math.inf,
    skip_broken: bool = False,
) -> Documents:
    """Tokenize as much of a source as is needed, where that is not done yet.

    Args:
        source: where the text comes from.
        tokenizer: the model's.
        cache: folder of the token files.
        needed: tokens; a source that is not streamed is read whole.
        skip_broken: leave out the rest of a shard that cannot be read, with a warning, instead of stopping.

    Raises:
        UserError: if the source is missing or empty, or a shard cannot be read.
    """
    files = [TokenFile(shard, tokenizer, cache) for shard in shards_of(source)]
    if not source.streaming:
        needed = math.inf
    if source.documents is not None:
        parts = _first(files, source.documents, needed, skip_broken)
    else:
        parts = _shares(files, needed, skip_broken)
    documents = _together(files, parts, apart=math.isfinite(needed) and source.documents is None)
    if len(documents) == 0:
        raise UserError(f"data: source {source.path or source.kind!r} has no text in it")
    return documents


def _first(files: Sequence[TokenFile], documents: int, tokens: float, skip: bool) -> list[tuple[int, int]]:
    """The first documents of a source; shards and how many documents of each."""
    parts = []
    for number, file in enumerate(files):
        file.grow(tokens, documents)
        count = min(_count(file, tokens, skip, documents), documents)
        parts.append((number, count))
        documents -= count
        tokens -= int(file.documents["end"][count - 1]) if count else 0
        if documents <= 0 or tokens <= 0:
            break
    return parts


def _shares(files: Sequence[TokenFile], needed: float, skip: bool) -> list[tuple[int, int]]:
    """Equal shares of evenly spread shards, more of each and more of them until it is enough."""
    used = len(files) if math.isinf(needed) else min(len(files), max(1, math.ceil(needed / _LEAST_SHARE)))
    share = needed / used
    while True:
        chosen = [place * len(files) // used for place in range(used)]
        _grow_together([files[number] for number in chosen], share)
        parts = [(number, _count(files[number], share, skip)) for number in chosen]
        found = [int(files[number].documents["end"][count - 1]) if count else 0 for number, count in parts]
        missing, more = needed - sum(found), sum(tokens >= share for tokens in found)
        if missing <= 0 or (not more and used == len(files)):
            return parts
        if more:
            share += missing / more
        else:
            used = min(len(files), 2 * used)


def _grow_together(files: Sequence[TokenFile], tokens: float) -> None:
    """Processes begin with shards of their own, and then see to it that all are there.

    There is no process group yet: files' locks keep them apart, and on machines that do not share the cache each
    does all the work that its machine needs.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for file in [*files[rank::world], *files]:
        file.grow(tokens, math.inf)


def _count(file: TokenFile, tokens: float, skip: bool, documents: float = math.inf) -> int:
    """Documents of a shard that hold so many tokens; all if it has fewer.

    Raises:
        UserError: if the shard is broken before them.
    """
    ends, broken = file.documents["end"], file.index.broken
    if len(ends) and (ends[-1] >= tokens or len(ends) >= documents):
        return min(int(np.searchsorted(ends, tokens)) + 1, len(ends))
    if broken is not None:
        if not skip:
            raise UserError(broken)
        warn_of_broken(broken)
    return len(ends)


def _together(files: list[TokenFile], parts: list[tuple[int, int]], apart: bool) -> Documents:
    """One table of the documents; `apart` counts places in each shard and not through all of them."""
    tables = [files[number].documents[:count] for number, count in parts]
    counts = [len(table) for table in tables]
    ends = [np.asarray(table["end"], dtype=np.int64) for table in tables]
    begins = [np.concatenate([np.zeros(1, np.int64), end[:-1]]) if len(end) else end for end in ends]
    begin = _joined(begins, np.int64)
    places = [np.arange(count) for count in counts] if apart else [np.arange(sum(counts))]
    return Documents(
        tuple(files),
        np.repeat(np.array([number for number, _ in parts], dtype=np.int64), counts),
        begin,
        _joined(ends, np.int64) - begin,
        _joined([np.asarray(table["hash"]) for table in tables], np.uint64),
        _joined(places, np.int64),
    )


def _joined(arrays: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])
