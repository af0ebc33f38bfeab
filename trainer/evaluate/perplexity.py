"""Perplexity over held-out blocks, averaged over tokens, with the losses of each document for intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

# Logits held at a time: 64 tokens of a vocabulary of 128,256 are 33 MB in fp32.
_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Perplexity:
    """Held-out loss.

    Attributes:
        losses: one `(sum of token losses in nats, tokens)` for each document.
    """

    losses: list[tuple[float, int]]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.losses)

    @property
    def value(self) -> float:
        """exp of the mean loss a token."""
        return math.exp(sum(loss for loss, _ in self.losses) / self.tokens)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its output head."""
    return getattr(model, model.base_model_prefix)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    return next(model.get_input_embeddings().parameters()).device


def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Hidden states after the final norm: ids int64 `[B, S]` to `[B, S, D]`."""
    return decoder(model)(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Next-token losses, fp32 `[B, S − 1]`, without holding the logits of all tokens.

    Args:
        model: a causal language model, packed or not.
        ids: int64 `[B, S]`.
    """
    return losses_of_hidden(model, last_hidden(model, ids), ids)


@torch.no_grad()
def losses_of_hidden(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Next-token losses, fp32 `[B, S − 1]`, from the hidden states after the final norm, `[B, S, D]`."""
    hidden = hidden[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    head = model.get_output_embeddings()
    parts = [
        cross_entropy(head(rows).float(), goal, reduction="none")
        for rows, goal in zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(parts).view(len(ids), -1)


def perplexity(
    model: PreTrainedModel,
    blocks: Tensor,
    documents: Tensor,
    batch_size: int = 4,
    on_progress: Callable[[int], None] | None = None,
    losses_of: Callable[[Tensor], Tensor] | None = None,
) -> Perplexity:
    """Measure held-out perplexity.

    Args:
        model: a causal language model, packed or not, in evaluation mode.
        blocks: token ids, int64 `[blocks, S]`.
        documents: document of each token, the shape of `blocks`.
        batch_size: blocks at a time.
        on_progress: called with the number of tokens done.
        losses_of: computes token losses `[B, S − 1]` of a batch; by default `token_losses` of the model.
    """
    device = device_of(model)
    compute = losses_of or (lambda ids: token_losses(model, ids))
    return document_losses(lambda ids: compute(ids.to(device)), blocks, documents, batch_size, on_progress)


def document_losses(
    losses_of: Callable[[Tensor], Tensor],
    blocks: Tensor,
    documents: Tensor,
    batch_size: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Held-out perplexity of anything that gives token losses.

    Args:
        losses_of: computes token losses `[B, S − 1]` of token ids `[B, S]`.
        blocks: token ids, int64 `[blocks, S]`.
        documents: document of each token, the shape of `blocks`.
        batch_size: blocks at a time.
        on_progress: called with the number of tokens done.
    """
    per_document: dict[int, list[float]] = {}
    done = 0
    for ids, owners in zip(blocks.split(batch_size), documents.split(batch_size), strict=True):
        losses = losses_of(ids).double().cpu()
        for owner in owners[:, 1:].unique().tolist():
            inside = owners[:, 1:] == owner
            entry = per_document.setdefault(owner, [0.0, 0])
            entry[0] += float(losses[inside].sum())
            entry[1] += int(inside.sum())
        done += ids.numel()
        if on_progress:
            on_progress(done)
    return Perplexity(
        [(loss, int(tokens)) for loss, tokens in (per_document[k] for k in sorted(per_document))]
    )
