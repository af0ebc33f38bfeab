"""Documents: where text comes from, shard by shard, and the split into train and held-out by document.

A shard is what can be read by itself: a file, or one of the pieces that a streamed hub data set comes in. Its
documents always come in the same order, so a position in it is a number of documents.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import DataSource

_SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class Shard:
    """A part of a source.

    Attributes:
        name: what people know it by.
        identity: tells whether the text can have changed: path, size and time of a file, version of a data set.
        read: documents from a position on, empty ones included; raises `UserError` where the shard is broken.
    """

    name: str
    identity: str
    read: Callable[[int], Iterator[str]]


def shards_of(source: DataSource) -> list[Shard]:
    """The shards of a source, in its own order.

    Raises:
        UserError: if there are none, or a hub data set cannot be loaded.
    """
    if source.kind == "cpython_docs":
        return [_cpython_docs()]
    if source.kind == "hub":
        return _hub(source)
    readers = {"text": _text_file, "jsonl": _jsonl_file, "parquet": _parquet_file}
    read = readers[source.kind]
    return [_file_shard(file, source, read) for file in _files(source)]


def read_documents(source: DataSource, skip_broken: bool = False) -> Iterator[str]:
    """Yield the documents of a source in its own order, without empty ones.

    Args:
        source: where they come from.
        skip_broken: leave out the rest of a shard that cannot be read, with a warning, instead of stopping.

    Raises:
        UserError: if the source is missing or empty, or a shard cannot be read.
    """
    count = 0
    for shard in shards_of(source):
        try:
            for document in shard.read(0):
                if document.strip():
                    count += 1
                    yield document
                if count == source.documents:
                    return
        except UserError as error:
            if not skip_broken:
                raise
            warn_of_broken(str(error))
    if count == 0:
        raise UserError(f"data: source {source.path or source.kind!r} has no text in it")


def warn_of_broken(error: str) -> None:
    """Name a shard the rest of which is left out."""
    warnings.warn(f"{error}; the rest of this shard is left out", RuntimeWarning, stacklevel=2)


def split_documents(documents: Iterable[str], every: int) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents: the first of every `every` is held out.

    The choice depends on the position in the source alone, so that it is the same for every seed and machine.
    A training document that repeats a held-out one is left out, since it would leak.

    Returns:
        Training documents and held-out documents, each in source order.
    """
    train: list[str] = []
    held_out: list[str] = []
    for index, document in enumerate(documents):
        (train if index % every else held_out).append(document)
    secret = set(held_out)
    return [document for document in train if document not in secret], held_out


def check_source(source: DataSource) -> None:
    """Refuse a source whose files are missing or empty, without reading them.

    Raises:
        UserError: naming the path.
    """
    if source.kind not in _SUFFIXES:
        return
    for file in _files(source):
        if file.stat().st_size == 0:
            raise UserError(f"data: file {str(file)!r} is empty")


def _cpython_docs() -> Shard:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Shard("cpython_docs", f"cpython_docs:{digest}", lambda start: iter(texts[start:]))


def _files(source: DataSource) -> list[Path]:
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        suffixes = _SUFFIXES[source.kind]
        files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not files:
        raise UserError(f"data: {source.path!r} does not exist or holds no {source.kind} file")
    return files


def _file_shard(file: Path, source: DataSource, read: Callable[[Path, DataSource], Iterator[str]]) -> Shard:
    stat = file.stat()
    form = f"{source.kind}:{source.field}:{source.separator!r}"
    return Shard(
        str(file),
        f"{form}:{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}",
        lambda start: islice(read(file, source), start, None),
    )


def _text_file(file: Path, source: DataSource) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {str(file)!r} cannot be read as UTF-8 text: {error}") from None
    yield from _split_text(text, source.separator)


def _split_text(text: str, separator: str | None) -> Iterable[str]:
    if separator is not None:
        return text.split(separator.encode().decode("unicode_escape"))
    return text.split("\n\n")


def _jsonl_file(file: Path, source: DataSource) -> Iterator[str]:
    try:
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    raise UserError(f"data: {file}:{number} is not a JSON object") from None
                yield _text_field(row, source.field, f"{file}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"data: {str(file)!r} cannot be read as UTF-8 JSON lines: {error}") from None


def _open_text(file: Path) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _parquet_file(file: Path, source: DataSource) -> Iterator[str]:
    """Row group by row group, the text column alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if source.field not in table.schema_arrow.names:
                _text_field(dict.fromkeys(table.schema_arrow.names), source.field, str(file))
            for batch in table.iter_batches(columns=[source.field]):
                yield from map(str, batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data: {str(file)!r} is not a whole Parquet file: {_first_line(error)}") from None


def _text_field(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"data: {where} has no field {field!r} (it has {known}); set data.train.field")
    return str(row[field])


def _hub(source: DataSource) -> list[Shard]:
    """A hub data set, through the `datasets` library: downloaded whole, or streamed piece by piece."""
    import datasets

    datasets.disable_progress_bars()
    try:
        version = datasets.load_dataset_builder(str(source.path), source.subset).cache_dir
        rows = datasets.load_dataset(
            str(source.path), source.subset, split=source.split, streaming=source.streaming
        )
    except Exception as error:
        raise UserError(f"data: {source.path!r} cannot be loaded: {_first_line(error)}") from None
    pieces = rows.num_shards if source.streaming else 1
    return [_hub_shard(source, rows, version, piece, pieces) for piece in range(pieces)]


def _hub_shard(source: DataSource, rows: Any, version: str, piece: int, pieces: int) -> Shard:
    name = f"{source.path}[{source.split}]" + (f" piece {piece + 1}/{pieces}" if pieces > 1 else "")

    def read(start: int) -> Iterator[str]:
        part = rows.shard(num_shards=pieces, index=piece) if pieces > 1 else rows
        try:
            for number, row in enumerate(part.skip(start), start):
                yield _text_field(row, source.field, f"{name}, row {number}")
        except UserError:
            raise
        except Exception as error:
            # Whatever a reader or the network raises: the library has no common base of its errors.
            raise UserError(f"data: {name} cannot be read: {_first_line(error)}") from None

    return Shard(name, f"hub:{version}:{source.split}:{source.field}:{piece}/{pieces}", read)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
