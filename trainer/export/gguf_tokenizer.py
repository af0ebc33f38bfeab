"""The tokenizer inside a GGUF file: byte-level BPE, as LLaMA-3, SmolLM, Qwen and GPT-2 use it."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.recipe.errors import UserError

#: llama.cpp knows how to split text by a name; here found by what the tokenizer's own splitting looks like.
_LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
_QWEN2 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"


def write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Args:
        writer: the file under way.
        tokenizer: a fast tokenizer of byte-level BPE.
        vocabulary: rows of the embedding table; missing tokens are filled with unused ones.

    Raises:
        UserError: for another kind of tokenizer.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = definition["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UserError(
            "export gguf: only tokenizers of byte-level BPE are supported; convert this model's folder with "
            "llama.cpp's own converter"
        )
    tokens, types = _tokens(definition, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(definition, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # llama.cpp insists on merges; of one whose product is no token, it falls back to the parts.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(definition: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how a tokenizer splits text before merging."""
    parts = definition["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    kinds = [part.get("type") for part in parts]
    patterns = [
        str(part.get("pattern", {}).get("Regex", "")) for part in parts if part.get("type") == "Split"
    ]
    if "Digits" in kinds:
        return "smollm"
    if any(pattern.startswith(_LLAMA3) for pattern in patterns):
        return "llama-bpe"
    if any(pattern.startswith(_QWEN2) for pattern in patterns):
        return "qwen2"
    if kinds == ["ByteLevel"]:
        return _byte_level(tokenizer)
    raise UserError(f"export gguf: llama.cpp has no name for this tokenizer's pre-tokenizer ({kinds})")


def _byte_level(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer that came from a GGUF file keeps no more than `ByteLevel`: its tokens tell its name."""
    return "smollm" if "<|im_start|>" in tokenizer.get_vocab() and tokenizer.vocab_size == 49152 else "gpt-2"


def _tokens(definition: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    tokens = {index: token for token, index in definition["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    for index in range(vocabulary):
        if index not in tokens:
            tokens[index], types[index] = f"[unused{index}]", TokenType.UNUSED
    return [tokens[i] for i in range(vocabulary)], [types[i] for i in range(vocabulary)]
