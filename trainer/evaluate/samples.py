"""What a model writes: short greedy continuations of held-out text, to be read side by side in the report."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatapult.trainer.evaluate.perplexity import device_of

_PROMPT_TOKENS = 48
_PROMPTS = 3


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Tensor, tokens: int
) -> list[dict[str, str]]:
    """Continue the beginnings of held-out blocks.

    Args:
        model: a causal language model, packed or not, in evaluation mode.
        tokenizer: its tokenizer.
        held_out: token ids, int64 `[blocks, S]`.
        tokens: how many to generate.

    Returns:
        `[{"prompt", "text"}]`, the same prompts for every model.
    """
    device = device_of(model)
    length = min(_PROMPT_TOKENS, held_out.shape[1])
    samples = []
    for block in held_out[:: max(1, len(held_out) // _PROMPTS)][:_PROMPTS]:
        prompt = block[None, :length].to(device)
        written = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        pieces = tokenizer.batch_decode([prompt[0], written[0, length:]], skip_special_tokens=True)
        samples.append(dict(zip(("prompt", "text"), pieces, strict=True)))
    return samples
