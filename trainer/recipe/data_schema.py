"""The recipe's model and data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from qatapult.trainer.recipe.sections import Positive, Section


class Model(Section):
    """The checkpoint to quantize."""

    source: str = Field(
        description="A folder in Hugging Face format, a hub id, a `.gguf` file, `package:NAME/FILE` for a file "
        "inside an installed package, or `random:SHAPE` for random weights of a named shape (for tests and "
        "benchmarks; the shapes are listed by `qatapult recipe shapes`)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    tokenizer: str | None = Field(
        None, description="Where the tokenizer comes from, if not from the model's own source."
    )
    allow_pickle: bool = Field(
        False, description="Also read `.bin` weights, which are pickles and can run code."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")


class DataSource(Section):
    """Where documents come from."""

    kind: Literal["cpython_docs", "text", "jsonl", "parquet", "hub", "random"] = Field(
        description="`cpython_docs` (the language reference that every CPython carries), `text` (files; documents "
        "are separated by blank lines or by `separator`), `jsonl`, `parquet`, `hub` (a hub data set), "
        "or `random` (token ids, for benchmarks). `qatapult teacher write` makes JSONL of the teacher's own text."
    )
    path: str | None = Field(None, description="File, folder, glob, or hub data set id.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    field: str = Field("text", description="Column that holds the text (JSONL, Parquet, hub).")
    separator: str | None = Field(
        None, description="What separates documents in a text file; blank lines if absent."
    )
    streaming: bool = Field(
        False,
        description="Read no more of the source than the run needs, the same share of every shard in use.",
    )
    shuffle_buffer: int = Field(
        0,
        ge=0,
        description="Documents in a buffer that shuffles them before they are packed; 0 keeps their order.",
    )
    weight: float = Field(1.0, gt=0, description="Share of this source in a mixture, relative to the others.")
    documents: Positive | None = Field(None, description="Use at most so many documents.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> DataSource:
        needs_path = self.kind in ("text", "jsonl", "parquet", "hub")
        if needs_path and not self.path:
            raise ValueError(f"path is missing: kind '{self.kind}' reads from a path")
        return self


class Data(Section):
    """Text to train on and text to judge by. The split is by document and never changes with the seed."""

    train: list[DataSource] = Field(
        default=[DataSource(kind="cpython_docs")],
        min_length=1,
        description="One source, or a weighted mixture.",
    )
    held_out: DataSource | None = Field(
        None, description="Where held-out documents come from; by default a share of the training documents."
    )
    held_out_every: int = Field(
        8, ge=2, description="The first of every so many documents is held out, in the source's order."
    )
    block_size: int = Field(512, ge=8, description="Tokens a block.")
    evaluation_blocks: Positive = Field(16, description="Held-out blocks that the perplexity is measured on.")
    shuffle: bool = Field(True, description="Shuffle blocks anew in each pass over the data.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the training blocks to use.")
    on_broken_shard: Literal["refuse", "skip"] = Field(
        "refuse", description="What to do with a data shard that cannot be read."
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value
