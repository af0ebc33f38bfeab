"""Documents, the split and blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.data.byte_tokenizer import byte_tokenizer
from qatapult.trainer.data.documents import read_documents, split_documents
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import DataSource


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATAPULT_CACHE", str(tmp_path_factory.mktemp("cache")))


def recipe_with(train: str, *more: str):  # type: ignore[no-untyped-def]
    return load_recipe("tiny-random-w4a8", [f"data.train={train}", *more])


def test_the_split_is_by_document_and_leaks_nothing() -> None:
    documents = [f"document {i % 30}" for i in range(80)]
    train, held_out = split_documents(documents, every=8)
    assert len(held_out) == 10
    assert not set(train) & set(held_out)


def test_blocks_hold_the_text_in_order(tmp_path: Path) -> None:
    texts = [f"{i:03d} " * 40 for i in range(40)]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    data = load_data(recipe_with(f"[{{kind: jsonl, path: '{file}', field: body}}]"), byte_tokenizer())
    train, held_out = split_documents(texts, 8)
    stream = "<|end|>".join(train) + "<|end|>"
    decoded = byte_tokenizer().decode(data.train[:].flatten())
    assert stream.startswith(decoded)
    assert len(stream) - len(decoded) < 8 * data.train.shape[1]
    assert data.held_out_documents.max() < len(held_out)
    assert data.train[:].dtype == data.train[3].dtype == torch.int64
    assert torch.equal(data.train[2:4], data.train[torch.tensor([2, 3])])


def test_text_files_are_split_at_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
    assert list(read_documents(DataSource(kind="text", path=str(tmp_path)))) == [
        "one",
        "two",
        "\n\nthree"[2:],
    ]
    (tmp_path / "a.txt").write_text("one---two")
    assert list(read_documents(DataSource(kind="text", path=str(tmp_path), separator="---"))) == [
        "one",
        "two",
    ]


def test_parquet_shards_are_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["first", "second"]}).to_parquet(tmp_path / "shard.parquet")
    assert list(read_documents(DataSource(kind="parquet", path=str(tmp_path)))) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no text"), ('{"other": 1}', "no field 'text'"), ("not json", "not a JSON object")],
)
def test_broken_jsonl_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(DataSource(kind="jsonl", path=str(file))))


def test_the_same_text_gives_the_same_blocks_for_every_seed() -> None:
    one = load_data(load_recipe("tiny-random-w4a8"), byte_tokenizer())
    other = load_data(load_recipe("tiny-random-w4a8", ["seed=5"]), byte_tokenizer())
    assert one.fingerprint == other.fingerprint
