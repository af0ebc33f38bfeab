"""Documents: where text comes from, and the split into train and held-out by document."""

from __future__ import annotations

import glob
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import DataSource


def read_documents(source: DataSource, skip_broken: bool = False) -> Iterator[str]:
    """Yield the documents of a source in its own order.

    Args:
        source: where they come from.
        skip_broken: leave out the rest of a file that cannot be read, with a warning, instead of stopping.

    Raises:
        UserError: if the source is missing or empty, or a shard cannot be read.
    """
    readers = {
        "cpython_docs": _cpython_docs,
        "text": _text_files,
        "jsonl": _jsonl,
        "parquet": _data_set,
        "hub": _data_set,
    }
    count = 0
    for document in readers[source.kind](source, skip_broken):
        if document.strip():
            count += 1
            yield document
        if count == source.documents:
            return
    if count == 0:
        raise UserError(f"data: source {source.path or source.kind!r} has no text in it")


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
    if source.kind not in ("text", "jsonl", "parquet"):
        return
    for file in _files(source):
        if file.stat().st_size == 0:
            raise UserError(f"data: file {str(file)!r} is empty")


def _cpython_docs(source: DataSource, skip_broken: bool) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _files(source: DataSource) -> list[Path]:
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        suffixes = {"text": (".txt", ".md"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}[
            source.kind
        ]
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not files:
        raise UserError(f"data: {source.path!r} does not exist or holds no {source.kind} file")
    return files


def _text_files(source: DataSource, skip_broken: bool) -> Iterator[str]:
    yield from _each_file(source, _text_file, skip_broken)


def _each_file(
    source: DataSource, read: Callable[[Path, DataSource], Iterator[str]], skip_broken: bool
) -> Iterator[str]:
    for file in _files(source):
        try:
            yield from read(file, source)
        except UserError as error:
            if not skip_broken:
                raise
            warnings.warn(f"{error}; the rest of this file is left out", RuntimeWarning, stacklevel=2)


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


def _jsonl(source: DataSource, skip_broken: bool) -> Iterator[str]:
    yield from _each_file(source, _jsonl_file, skip_broken)


def _jsonl_file(file: Path, source: DataSource) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise UserError(f"data: {file}:{number} is not a JSON object") from None
            yield _text_field(row, source.field, f"{file}:{number}")


def _text_field(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"data: {where} has no field {field!r} (it has {known}); set data.train.field")
    return str(row[field])


def _data_set(source: DataSource, skip_broken: bool) -> Iterator[str]:
    """Parquet shards and hub data sets, through the `datasets` library."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.kind == "parquet":
            files = [str(file) for file in _files(source) if _is_parquet(file, skip_broken)]
            rows = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=source.streaming
            )
        else:
            rows = datasets.load_dataset(
                str(source.path), source.subset, split=source.split, streaming=source.streaming
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data: {source.path!r} cannot be loaded: {str(error).splitlines()[0][:200]}"
        ) from None
    for number, row in enumerate(rows):
        yield _text_field(row, source.field, f"{source.path}[{number}]")


def _is_parquet(file: Path, skip_broken: bool) -> bool:
    """Whether a shard has a readable footer; a broken one is refused, or skipped with a warning."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError):
        if not skip_broken:
            raise UserError(f"data: {str(file)!r} is not a whole Parquet file") from None
        warnings.warn(
            f"data: {str(file)!r} is not a whole Parquet file; it is left out", RuntimeWarning, stacklevel=2
        )
        return False
    return True
