"""Tokenized shards on disk: written once, grown when a run needs more, mapped into memory by every process.

A shard's folder below the cache holds `tokens.bin` (uint16 where the vocabulary allows it, else uint32),
`documents.bin` (for each document the end of its tokens and a hash of its text) and `index.json`, which says how much
of both counts. Both files are only ever appended to, and the index is replaced atomically after them: whatever a
process that died left behind is cut off by the next one that grows the shard. A lock keeps writers apart.

The folder's name is a hash of the shard's identity and of the tokenizer. Nothing about the run is in it, so runs with
other splits, block sizes and seeds share the same files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.data.documents import Shard
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.run_folder import write_json

_DOCUMENT = np.dtype([("end", "<i8"), ("hash", "<u8")])
# Documents that are tokenized and written at a time.
_BATCH = 512
_SHORT_VOCABULARY = 2**16
_FORMAT = 1


@dataclass(frozen=True)
class Index:
    """How much of a tokenized shard there is.

    Attributes:
        read: documents of the shard that were read, empty ones included.
        documents: documents stored.
        tokens: tokens stored, each document's end token included.
        finished: whether the shard has no more.
        broken: what is wrong with the shard from there on, or None.
    """

    read: int = 0
    documents: int = 0
    tokens: int = 0
    finished: bool = False
    broken: str | None = None


class TokenFile:
    """One tokenized shard.

    Args:
        shard: the text.
        tokenizer: turns it into tokens; each document is closed by its end-of-text token, if it has one.
        folder: the cache of all shards.
    """

    def __init__(self, shard: Shard, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.shard = shard
        self._tokenizer = tokenizer
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._dtype = np.dtype("<u2" if len(tokenizer) <= _SHORT_VOCABULARY else "<u4")
        key = f"{_FORMAT}\0{shard.identity}\0{tokenizer_fingerprint(tokenizer)}"
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:24]

    @property
    def index(self) -> Index:
        file = self.folder / "index.json"
        return Index(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else Index()

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All stored tokens, mapped into memory."""
        return self._map("tokens.bin", self._dtype, self.index.tokens)

    @property
    def documents(self) -> npt.NDArray[Any]:
        """Fields `end` (of the document's tokens) and `hash` (of its text), one a document."""
        return self._map("documents.bin", _DOCUMENT, self.index.documents)

    def grow(self, tokens: float, documents: float) -> Index:
        """Tokenize on until the shard has so many tokens or so many documents, or has no more.

        Several processes may call it at once: one writes, the others wait and find the work done.

        Raises:
            OSError: if the disk is full.
        """
        if self._enough(self.index, tokens, documents):
            return self.index
        with self._locked():
            index = self.index
            if not self._enough(index, tokens, documents):
                index = self._append(index, tokens, documents)
        return index

    @staticmethod
    def _enough(index: Index, tokens: float, documents: float) -> bool:
        return index.finished or index.tokens >= tokens or index.documents >= documents

    def _append(self, index: Index, tokens: float, documents: float) -> Index:
        texts = self.shard.read(index.read)
        with (
            self._open("tokens.bin", index.tokens * self._dtype.itemsize) as token_file,
            self._open("documents.bin", index.documents * _DOCUMENT.itemsize) as document_file,
        ):
            while not self._enough(index, tokens, documents):
                batch, broken = _take(texts, _BATCH)
                stored = [text for text in batch if text.strip()]
                ids = self._tokenize(stored)
                ends = index.tokens + np.cumsum([len(one) for one in ids], dtype=np.int64)
                token_file.write(np.concatenate([*ids, np.empty(0, self._dtype)]).tobytes())
                entries = [(end, text_hash(text)) for end, text in zip(ends.tolist(), stored, strict=True)]
                document_file.write(np.array(entries, dtype=_DOCUMENT).tobytes())
                for file in (token_file, document_file):
                    file.flush()
                    os.fsync(file.fileno())  # before the index that counts on them
                index = Index(
                    index.read + len(batch),
                    index.documents + len(stored),
                    int(ends[-1]) if len(ends) else index.tokens,
                    finished=len(batch) < _BATCH,
                    broken=broken,
                )
                write_json(self.folder / "index.json", asdict(index))
        return index

    def _tokenize(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array([*ids, *self._end], dtype=self._dtype) for ids in encoded]

    @contextmanager
    def _open(self, name: str, size: int) -> Iterator[IO[bytes]]:
        file = self.folder / name
        file.touch()
        with file.open("r+b") as opened:
            opened.truncate(size)
            opened.seek(size)
            yield opened

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _map(self, name: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.folder / name, dtype, mode="r", shape=(count,))


def _take(texts: Iterator[str], count: int) -> tuple[list[str], str | None]:
    """The next documents, and what went wrong if the shard is broken after them."""
    taken: list[str] = []
    try:
        for text in islice(texts, count):
            taken.append(text)
    except UserError as error:
        return taken, str(error)
    return taken, None


def text_hash(text: str) -> int:
    """64 bits by which a document is known again."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    parts = f"{type(tokenizer).__name__}\0{rules}\0{tokenizer.eos_token_id}\0{len(tokenizer)}"
    return hashlib.sha256(parts.encode()).hexdigest()
