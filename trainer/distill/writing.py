"""Text written by the teacher itself: data for QAT without data (LLM-QAT, arXiv:2305.17888, section 2.2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def write_documents(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    documents: int,
    tokens: int,
    seed: int = 0,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Append sampled documents to a JSONL file until it has enough; a file that exists is gone on with.

    Each document starts from the end-of-text token and is sampled at temperature 1. A batch is seeded by its
    place, so that an interrupted file ends up the same as one written in one go.

    Args:
        teacher: full precision.
        tokenizer: its tokenizer; needs an end-of-text token.
        file: JSONL with a field `text`.
        documents: how many lines the file shall have.
        tokens: longest document.
        seed: of the sampling.
        batch_size: documents at a time.
        on_progress: called with the number of lines.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_batches(file, batch_size)
    while done < documents:
        torch.manual_seed(seed * 1_000_003 + done)
        count = min(batch_size, documents - done)
        start = torch.full((count, 1), int(tokenizer.eos_token_id), device=teacher.device)
        sampled = teacher.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(sampled[:, 1:], skip_special_tokens=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        done += count
        if on_progress:
            on_progress(done)


def _whole_batches(file: Path, batch_size: int) -> int:
    """Lines of the whole batches in a file; what a crash left beyond them is cut off."""
    if not file.exists():
        return 0
    lines = [
        line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    whole = len(lines) // batch_size * batch_size
    file.write_text("".join(lines[:whole]), encoding="utf-8")
    return whole
