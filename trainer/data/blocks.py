"""Blocks of tokens: documents packed end to end, without leaking between train and held-out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import check_source, read_documents, split_documents
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
        documents = read_documents(source)
        if data.held_out is None:
            train, held_out = split_documents(documents, data.held_out_every)
            held_out_texts += held_out
        else:
            train = list(documents)
        train_texts += train
    if data.held_out is not None:
        held_out_texts = list(read_documents(data.held_out))
        secret = set(held_out_texts)
        train_texts = [text for text in train_texts if text not in secret]
    train_blocks, _ = _pack(train_texts, tokenizer, data.block_size, "training")
    held_out_blocks, owners = _pack(held_out_texts, tokenizer, data.block_size, "held-out")
    if data.fraction < 1:
        train_blocks = train_blocks[: max(1, round(len(train_blocks) * data.fraction))]
    limit = data.evaluation_blocks
    return TokenizedData(train_blocks, held_out_blocks[:limit], owners[:limit])


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
