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
    length = min(_PROMPT_TOKENS, held_out.shape[1])
    blocks = held_out[:: max(1, len(held_out) // _PROMPTS)][:_PROMPTS]
    # All prompts at once: a quantized model lays its weights on the grid once a token, not once a prompt.
    prompts = blocks[:, :length].to(device_of(model))
    written = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    answered = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(asked, answered, strict=True)]
