"""What every Hugging Face folder carries besides its weights, and how it appears: whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.export.trained import TrainedModel


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` at the end; an older one is replaced."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def source_dtype(model: TrainedModel) -> torch.dtype:
    """The dtype in which the full-precision checkpoint stores its weights; fp32 if it does not say."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def write_config(
    model: TrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Write config, generation config, tokenizer and chat template.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        folder: the Hugging Face folder.
        dtype: of what is not quantized.
        quantization_config: how the weights are stored, for `config.json`.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model.skeleton).__name__]
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if model.skeleton.generation_config is not None:
        model.skeleton.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
