"""Blocks of tokens: documents packed end to end, without leaking between train and held-out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import check_source, is_held_out, read_documents
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Data, Recipe


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
    train_texts: list[str] = []
    held_out_texts: list[str] = []
    for source in data.train:
        for document in read_documents(source):
            held_out = data.held_out is None and is_held_out(document, data.held_out_every)
            (held_out_texts if held_out else train_texts).append(document)
    if data.held_out is not None:
        held_out_texts.extend(read_documents(data.held_out))
    train, _ = _pack(train_texts, tokenizer, data.block_size, "training")
    held_out, documents = _pack(held_out_texts, tokenizer, data.block_size, "held-out")
    if data.fraction < 1:
        train = train[: max(1, round(len(train) * data.fraction))]
    limit = data.evaluation_blocks
    return TokenizedData(train, held_out[:limit], documents[:limit])


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
