"""Blocks of tokens: documents packed end to end, without leaking between train and held-out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import check_source
from qatapult.trainer.data.packing import Blocks, MixedBlocks, PackedBlocks
from qatapult.trainer.data.streams import Documents, gather
from qatapult.trainer.models import cache_folder
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Data, DataSource, Recipe


@dataclass(frozen=True)
class TokenizedData:
    """Everything a run reads.

    Attributes:
        train: token ids, int64 `[blocks, block_size]` when indexed; on disk until then.
        held_out: token ids, int64 `[blocks, block_size]`.
        held_out_documents: index of the document of each held-out token, int64, the shape of `held_out`.
    """

    train: Blocks
    held_out: Tensor
    held_out_documents: Tensor

    @property
    def fingerprint(self) -> str:
        """Hash of the text, by which caches recognise their data."""
        digest = hashlib.sha256(f"{tuple(self.train.shape)}".encode())
        if isinstance(self.train, MixedBlocks):
            digest.update(self.train.digest())
        else:
            digest.update(self.train[:].numpy().tobytes())
        digest.update(self.held_out.numpy().tobytes())
        return digest.hexdigest()[:16]


def check_data(data: Data) -> None:
    """Refuse data that cannot be read, before anything is loaded.

    Raises:
        UserError: naming the file.
    """
    for source in (*data.train, *([data.held_out] if data.held_out else [])):
        check_source(source)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """Tokenize the recipe's text where that is not done yet, split it, and pack it.

    Raises:
        UserError: if a source is missing or empty, or shorter than one block; if the cache cannot be written.
    """
    data = recipe.data
    if data.train[0].kind == "random":
        return _random_tokens(recipe, len(tokenizer))
    cache, skip = cache_folder() / "tokens", data.on_broken_shard == "skip"
    try:
        read = [gather(s, tokenizer, cache, _tokens_needed(recipe, s), skip) for s in data.train]
        own = None
        if data.held_out is not None:
            own = gather(data.held_out, tokenizer, cache, data.evaluation_blocks * data.block_size, skip)
    except OSError as error:
        raise UserError(f"data: {cache} cannot be used ({error}); set $QATAPULT_CACHE to a folder") from None
    train, held_out = _split(read, own, data.held_out_every)
    packed = [
        PackedBlocks(documents.mixed(source.shuffle_buffer), data.block_size, "training")
        for documents, source in zip(train, data.train, strict=True)
    ]
    blocks = MixedBlocks(packed, [source.weight for source in data.train], data.fraction)
    return TokenizedData(blocks, *_held_out_blocks(held_out, data))


def _split(
    read: list[Documents], own: Documents | None, every: int
) -> tuple[list[Documents], list[Documents]]:
    """Training and held-out documents of each source; see `documents.split_documents`."""
    if own is None:
        held_out = [documents.select(documents.place % every == 0) for documents in read]
        read = [documents.select(documents.place % every != 0) for documents in read]
    else:
        held_out = [own]
    secret = np.concatenate([documents.hash for documents in held_out])
    return [documents.select(~np.isin(documents.hash, secret)) for documents in read], held_out


def _held_out_blocks(held_out: list[Documents], data: Data) -> tuple[Tensor, Tensor]:
    """The first held-out blocks, all sources end to end, and their tokens' documents."""
    files = tuple(file for documents in held_out for file in documents.files)
    first = np.cumsum([0, *(len(documents.files) for documents in held_out)])
    parts = [
        (documents.file + offset, documents.begin, documents.length, documents.hash, documents.place)
        for documents, offset in zip(held_out, first, strict=False)
    ]
    together = Documents(files, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    packed = PackedBlocks(together, data.block_size, "held-out")
    count = min(len(packed), data.evaluation_blocks)
    return packed[:count], packed.owners(count)


def _tokens_needed(recipe: Recipe, source: DataSource) -> float:
    """Tokens of a stream that the run will read: it need not end."""
    if not source.streaming:
        return math.inf
    share = source.weight / sum(other.weight for other in recipe.data.train)
    calibration = recipe.ptq.calibration.blocks * recipe.data.block_size
    longest = max(recipe.qat.tokens, recipe.qat.blockwise_tokens, calibration)
    held_out = 1.0
    if recipe.data.held_out is None:
        held_out = recipe.data.held_out_every / (recipe.data.held_out_every - 1)
    return int((longest / recipe.data.fraction * share + recipe.data.block_size) * held_out)


def _random_tokens(recipe: Recipe, vocabulary: int) -> TokenizedData:
    """Uniform token ids, for benchmarks: as many blocks as the run consumes, at most a thousand."""
    size = recipe.data.block_size
    generator = torch.Generator().manual_seed(recipe.seed)
    blocks = min(1000, max(recipe.qat.tokens // size, recipe.ptq.calibration.blocks))
    train = torch.randint(vocabulary, (blocks, size), generator=generator)
    held_out = torch.randint(vocabulary, (recipe.data.evaluation_blocks, size), generator=generator)
    documents = torch.arange(len(held_out)).unsqueeze(1).expand(-1, size)
    return TokenizedData(train, held_out, documents)
