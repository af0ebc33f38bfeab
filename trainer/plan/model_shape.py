"""What a plan needs to know of a model: its sizes, read without loading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model
from qatapult.trainer.shapes import RANDOM_SHAPES

#: Hub ids whose shape is known without asking the hub, by a pattern over the lower-case id.
_KNOWN_IDS = (
    (r"llama-2-(7|13|70)b", "llama-2-{0}b"),
    (r"llama-3(?:\.1)?-8b", "llama-3-8b"),
    (r"llama-3\.2-1b", "llama-3.2-1b"),
    (r"smollm2-135m", "smollm2-135m"),
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA-class decoder: RMSNorm, grouped-query attention, gated feed-forward."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def query_width(self) -> int:
        """Features of the queries, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Features of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name to (output, input) features."""
        return {
            "self_attn.q_proj": (self.query_width, self.hidden),
            "self_attn.k_proj": (self.kv_width, self.hidden),
            "self_attn.v_proj": (self.kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.query_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_linear_parameters(self) -> int:
        """Weights of the linears of one block."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def block_parameters(self) -> int:
        """Weights of one block, norms included."""
        return self.block_linear_parameters + 2 * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' linears: what is quantized, and what `trainable: linears` trains."""
        return self.layers * self.block_linear_parameters

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, which every token is multiplied with even where it is tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.block_parameters + self.hidden + embeddings


def shape_of(model: Model) -> ModelShape:
    """Read the sizes of a recipe's model without loading its weights.

    Args:
        model: the recipe's model section. `random:` shapes and well-known hub ids need no file at all.

    Raises:
        UserError: if the source has no configuration, or one that is not a LLaMA-class decoder's.
    """
    source = model.source
    if source.startswith("random:"):
        name = source.removeprefix("random:")
        if name not in RANDOM_SHAPES:
            raise UserError(f"model.source {source!r}: unknown shape; known are {', '.join(RANDOM_SHAPES)}")
        return shape_from_config(RANDOM_SHAPES[name], source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    for pattern, name in _KNOWN_IDS:
        found = re.search(pattern, source.lower())
        if found:
            return shape_from_config(RANDOM_SHAPES[name.format(*found.groups())], source)
    from qatapult.trainer.models import load_config

    return shape_from_config(load_config(model).to_dict(), source)


def shape_from_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """Sizes from the fields of a Hugging Face `config.json`.

    Raises:
        UserError: if a field that every LLaMA-class model has is missing.
    """
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return ModelShape(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(
            f"model.source {source!r}: its configuration has no field {error}; "
            "plans are made for LLaMA-class decoders (llama, mistral, qwen, smollm and their kin)"
        ) from None


def _from_folder(folder: Path) -> ModelShape:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"model.source {str(folder)!r} has no config.json; it is not a Hugging Face model folder"
        )
    try:
        return shape_from_config(json.loads(file.read_text(encoding="utf-8")), str(folder))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
