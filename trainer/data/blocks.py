"""Blocks of tokens: documents packed end to end, without leaking between train and held-out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import check_source, read_documents, split_documents
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Data, DataSource, Recipe


@dataclass(frozen=True)
class TokenizedData:
    """Everything a run reads.

    Attributes:
        train: token ids, int64 `[blocks, block_size]`.
        held_out: token ids, int64 `[blocks, block_size]`.
        held_out_documents: index of the document of each held-out token, int64, the shape of `held_out`.
    """

    train: Tensor
    held_out: Tensor
    held_out_documents: Tensor

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, by which caches recognise their data."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]


def check_data(data: Data) -> None:
    """Refuse data that cannot be read, before anything is loaded.

    Raises:
        UserError: naming the file.
    """
    for source in (*data.train, *([data.held_out] if data.held_out else [])):
        check_source(source)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """Read, split, tokenize and pack the recipe's text.

    Raises:
        UserError: if a source is missing or empty, or shorter than one block.
    """
    data = recipe.data
    if data.train[0].kind == "random":
        return _random_tokens(recipe, len(tokenizer))
    skip = data.on_broken_shard == "skip"
    own_held_out = None if data.held_out is None else list(read_documents(data.held_out, skip))
    parts: list[Tensor] = []
    held_out_texts: list[str] = own_held_out or []
    for source in data.train:
        documents = read_documents(source, skip)
        if source.streaming:
            documents = _until_enough(documents, tokenizer, _tokens_needed(recipe, source))
        if own_held_out is None:
            train, held_out = split_documents(documents, data.held_out_every)
            held_out_texts += held_out
        else:
            secret = set(own_held_out)
            train = [text for text in documents if text not in secret]
        parts.append(_pack(train, tokenizer, data.block_size, "training")[0])
    train_blocks = _mix(parts, [source.weight for source in data.train])
    held_out_blocks, owners = _pack(held_out_texts, tokenizer, data.block_size, "held-out")
    if data.fraction < 1:
        train_blocks = train_blocks[: max(1, round(len(train_blocks) * data.fraction))]
    limit = data.evaluation_blocks
    return TokenizedData(train_blocks, held_out_blocks[:limit], owners[:limit])


def _mix(parts: list[Tensor], weights: list[float]) -> Tensor:
    """As many blocks of each source as its weight asks for, without repeating any."""
    if len(parts) == 1:
        return parts[0]
    whole = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    counts = [max(1, round(whole * weight)) for weight in weights]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _tokens_needed(recipe: Recipe, source: DataSource) -> int:
    """Tokens of a stream that the run will read: it need not end."""
    share = source.weight / sum(other.weight for other in recipe.data.train)
    calibration = recipe.ptq.calibration.blocks * recipe.data.block_size
    held_out = 1.0
    if recipe.data.held_out is None:
        held_out = recipe.data.held_out_every / (recipe.data.held_out_every - 1)
    return int((max(recipe.qat.tokens, calibration) * share + recipe.data.block_size) * held_out)


def _until_enough(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[str]:
    """Read a stream until it has given so many tokens."""
    for document in documents:
        yield document
        tokens -= len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if tokens <= 0:
            return


def _pack(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, role: str
) -> tuple[Tensor, Tensor]:
    """Concatenate documents, each closed by the end-of-text token, and cut the stream into whole blocks."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    owners: list[int] = []
    if texts:
        for index, ids in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
            tokens += [*ids, *end]
            owners += [index] * (len(ids) + len(end))
    blocks = len(tokens) // block_size
    if blocks == 0:
        raise UserError(
            f"data: the {role} text has {len(tokens)} tokens, less than one block of {block_size}; "
            "give more text or set a smaller data.block_size"
        )
    length = blocks * block_size
    shape = (blocks, block_size)
    return torch.tensor(tokens[:length]).view(shape), torch.tensor(owners[:length]).view(shape)


def _random_tokens(recipe: Recipe, vocabulary: int) -> TokenizedData:
    """Uniform token ids, for benchmarks: as many blocks as the run consumes, at most a thousand."""
    size = recipe.data.block_size
    generator = torch.Generator().manual_seed(recipe.seed)
    blocks = min(1000, max(recipe.qat.tokens // size, recipe.ptq.calibration.blocks))
    train = torch.randint(vocabulary, (blocks, size), generator=generator)
    held_out = torch.randint(vocabulary, (recipe.data.evaluation_blocks, size), generator=generator)
    documents = torch.arange(len(held_out)).unsqueeze(1).expand(-1, size)
    return TokenizedData(train, held_out, documents)
