"""Streams: token files that are shared and grown, shares of shards, mixing, shuffling, broken shards, the loader."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatapult.trainer.data import documents, streams, token_files
from qatapult.trainer.data.blocks import TokenizedData, load_data
from qatapult.trainer.data.byte_tokenizer import byte_tokenizer
from qatapult.trainer.data.streams import gather
from qatapult.trainer.data.token_files import TokenFile
from qatapult.trainer.loop.batches import BatchPlan
from qatapult.trainer.loop.loader import Loader
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import DataSource

TOKENIZER = byte_tokenizer()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QATAPULT_CACHE", str(folder))
    return folder / "tokens"


def write_shards(folder: Path, shards: int = 4, rows: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        lines = (json.dumps({"text": f"shard {shard} row {row:04d} " * 4}) for row in range(rows))
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, shards: int = 3, rows: int = 40) -> Path:
    import datasets

    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        texts = [f"piece {shard} row {row:04d} " * 4 for row in range(rows)]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"train-{shard}.parquet")
    return folder


def load(sources: list[dict[str, Any]], *more: str) -> TokenizedData:
    options = ["data.block_size=32", "data.evaluation_blocks=2", "qat.tokens=1024", *more]
    recipe = load_recipe("tiny-random-w4a8", [f"data.train={json.dumps(sources)}", *options])
    return load_data(recipe, TOKENIZER)


def text_of(data: TokenizedData) -> str:
    return str(TOKENIZER.decode(data.train[:].flatten()))


def test_text_is_tokenized_once_and_mapped_by_all(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"kind": "jsonl", "path": str(write_shards(tmp_path / "text"))}
    first = load([source])

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(TokenFile, "_tokenize", refuse)
    again = load([source], "data.held_out_every=4", "seed=3")
    assert len(again.train) < len(first.train)
    maps = [TokenFile(shard, TOKENIZER, cache).tokens for shard in documents.shards_of(DataSource(**source))]
    assert all(isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 for tokens in maps)


def test_a_changed_file_or_tokenizer_is_tokenized_anew(tmp_path: Path, cache: Path) -> None:
    folder = write_shards(tmp_path / "text", shards=1)
    source = {"kind": "jsonl", "path": str(folder)}
    before = load([source])
    file = folder / "part-0.jsonl"
    file.write_text(file.read_text().replace("shard 0", "shard 9"))
    assert text_of(load([source])) == text_of(before).replace("shard 0", "shard 9")
    other = byte_tokenizer()
    other.eos_token = None
    assert token_files.tokenizer_fingerprint(other) != token_files.tokenizer_fingerprint(TOKENIZER)


def test_a_stream_takes_equal_shares_and_grows_to_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_LEAST_SHARE", 300)
    monkeypatch.setattr(token_files, "_BATCH", 4)
    source = {"kind": "jsonl", "path": str(write_shards(tmp_path / "text")), "streaming": True}
    load([source], "qat.tokens=256", "ptq.calibration.blocks=1")
    grown = load([source], "qat.tokens=2048")
    assert 1800 < len(grown.train) * 32 < 3000
    assert {f"shard {shard}" for shard in range(4)} == _shards_in(grown)
    monkeypatch.setenv("QATAPULT_CACHE", str(tmp_path / "fresh"))
    fresh = load([source], "qat.tokens=2048")
    assert torch.equal(fresh.train[:], grown.train[:])
    assert fresh.fingerprint == grown.fingerprint
    stored = sum(file.stat().st_size for file in (tmp_path / "fresh").rglob("tokens.bin"))
    whole = sum(len(file.read_text()) for file in (tmp_path / "text").iterdir())
    assert stored < whole  # two bytes a token, and still less than half of the text was tokenized


def _shards_in(data: TokenizedData) -> set[str]:
    return {" ".join(row.split()[:2]) for row in text_of(data).split("<|end|>") if row.startswith("shard")}


def _gather_as(rank: int, folder: str, cache: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    gather(DataSource(kind="jsonl", path=folder), TOKENIZER, Path(cache))


def test_processes_share_the_shards_and_see_the_same(tmp_path: Path, cache: Path) -> None:
    folder = write_shards(tmp_path / "text", shards=5, rows=600)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_gather_as, args=(rank, str(folder), str(cache))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    together = gather(DataSource(kind="jsonl", path=str(folder)), TOKENIZER, cache)
    alone = gather(DataSource(kind="jsonl", path=str(folder)), TOKENIZER, tmp_path / "alone")
    assert len(together) == 3000
    for field in ("file", "begin", "length", "hash"):
        assert np.array_equal(getattr(together, field), getattr(alone, field))


def test_what_a_killed_writer_left_behind_is_cut_off(tmp_path: Path, cache: Path) -> None:
    folder = write_shards(tmp_path / "text", shards=1, rows=600)
    (shard,) = documents.shards_of(DataSource(kind="jsonl", path=str(folder)))
    file = TokenFile(shard, TOKENIZER, cache)
    file.grow(10, float("inf"))
    assert file.index.documents == token_files._BATCH
    for name in ("tokens.bin", "documents.bin"):
        with (file.folder / name).open("ab") as torn:
            torn.write(b"half of a batch that no index counts")
    file.grow(float("inf"), float("inf"))
    whole = TokenFile(shard, TOKENIZER, tmp_path / "alone")
    whole.grow(float("inf"), float("inf"))
    assert np.array_equal(file.tokens, whole.tokens)
    assert np.array_equal(file.documents, whole.documents)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_piece_by_piece(tmp_path: Path, streaming: bool) -> None:
    folder = write_parquet(tmp_path / "set")
    source = DataSource(kind="hub", path=str(folder), streaming=streaming)
    assert len(documents.shards_of(source)) == (3 if streaming else 1)
    expected = [f"piece {shard} row {row:04d} " * 4 for shard in range(3) for row in range(40)]
    assert list(documents.read_documents(source)) == expected
    assert list(documents.shards_of(source)[-1].read(38))[-1] == expected[-1]
    data = load([source.model_dump()])
    assert "piece 0" in text_of(data)


def test_a_hub_data_set_that_changed_is_another(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", shards=1)
    source = DataSource(kind="hub", path=str(folder), streaming=True)
    before = documents.shards_of(source)[0].identity
    assert documents.shards_of(source)[0].identity == before
    write_parquet(folder, shards=1, rows=41)
    assert documents.shards_of(source)[0].identity != before


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_a_broken_shard_is_named_and_refused_or_skipped(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        folder = write_parquet(tmp_path / "text")
        victim = folder / "train-1.parquet"
        victim.write_bytes(victim.read_bytes()[:-40])
    else:
        folder = write_shards(tmp_path / "text", shards=3)
        victim = folder / "part-1.jsonl"
        if kind == "jsonl.gz":
            packed = gzip.compress(victim.read_bytes())
            victim.unlink()
            victim = folder / "part-1.jsonl.gz"
            victim.write_bytes(packed[:-30])
        else:
            victim.write_text(victim.read_text() + "{half a li")
    source = {"kind": kind.removesuffix(".gz"), "path": str(folder)}
    with pytest.raises(UserError, match=victim.name):
        load([source])
    with pytest.warns(RuntimeWarning, match=victim.name):
        data = load([source], "data.on_broken_shard=skip")
    text = text_of(data)
    assert "row 0039" in text
    assert ("1 row 0001" in text) == (kind != "parquet")  # the lines before the broken one are used
    with pytest.raises(UserError, match=victim.name):  # cached, and still refused
        load([source])


def test_weights_hold_in_every_stretch_of_a_mixture(tmp_path: Path) -> None:
    sources = [
        {"kind": "jsonl", "path": str(write_shards(tmp_path / name, shards=1, rows=rows)), "weight": weight}
        for name, rows, weight in (("one", 400, 3.0), ("two", 400, 1.0))
    ]
    (tmp_path / "two" / "part-0.jsonl").write_text(
        (tmp_path / "two" / "part-0.jsonl").read_text().replace("shard", "SHARD")
    )
    data = load(sources, "data.shuffle=false")
    upper = torch.tensor([bool("SHA" in str(TOKENIZER.decode(block)) or "RD" in str(TOKENIZER.decode(block)))
                          for block in data.train[:]]).float()  # fmt: skip
    assert upper.mean().item() == pytest.approx(0.25, abs=0.02)
    assert all(
        part.mean().item() == pytest.approx(0.25, abs=0.06) for part in upper.split(len(upper) // 5)[:5]
    )


def test_a_shuffle_buffer_mixes_neighbours_and_loses_nothing(tmp_path: Path) -> None:
    source = {"kind": "jsonl", "path": str(write_shards(tmp_path / "text", shards=1, rows=300))}
    plain = gather(DataSource(**source), TOKENIZER, tmp_path / "cache")
    mixed = plain.mixed(16)
    assert sorted(mixed.begin) == sorted(plain.begin)
    assert not np.array_equal(mixed.begin, plain.begin)
    assert np.array_equal(mixed.begin, plain.mixed(16).begin)
    # A document leaves the buffer no earlier than it came in.
    assert all(
        place - np.flatnonzero(plain.begin == begin)[0] > -16 for place, begin in enumerate(mixed.begin)
    )
    assert load([source | {"shuffle_buffer": 16}]).fingerprint != load([source]).fingerprint


def test_documents_that_repeat_held_out_ones_are_left_out_across_sources(tmp_path: Path) -> None:
    rows = [{"text": f"row {row} " * 20} for row in range(60)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, rows[::-1] if name == "b" else rows))
        )
    data = load([{"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")])
    held = {rows[i]["text"] for i in range(0, 60, 8)} | {rows[59 - i]["text"] for i in range(0, 60, 8)}
    assert not any(text in text_of(data) for text in held)


class CountingBlocks:
    """Blocks that tell which steps asked for them."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks, self.shape = blocks, tuple(blocks.shape)
        self.read: list[list[int]] = []
        self.ahead = threading.Event()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.read.append(index.tolist())
        if len(self.read) >= 3:
            self.ahead.set()
        return self.blocks[index]


def test_the_loader_reads_ahead_and_goes_to_any_step() -> None:
    blocks = CountingBlocks(torch.arange(40).view(20, 2))
    plan = BatchPlan(blocks=20, blocks_per_step=4, batch_size=2)
    loader = Loader(plan, blocks, CPU)
    for step in (0, 1, 2, 7, 3, 0):  # forward, a jump, and back as after a rollback
        batches = loader.step(step)
        assert [batch.indices.tolist() for batch in batches] == [i.tolist() for i in plan.step(step)]
        assert all(torch.equal(batch.ids, blocks.blocks[batch.indices]) for batch in batches)
    assert blocks.ahead.wait(10)
    loader.close()


def test_what_reading_raises_comes_out_of_the_loader() -> None:
    def fail(ids: torch.Tensor, blocks: torch.Tensor) -> Any:
        raise UserError("the cache is damaged")

    loader = Loader(BatchPlan(blocks=4, blocks_per_step=2, batch_size=2), torch.zeros(4, 2).long(), CPU, fail)
    with pytest.raises(UserError, match="damaged"):
        loader.step(0)
    loader.close()
