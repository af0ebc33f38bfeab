"""What is kept of a teacher's distribution: its likeliest tokens, and the probability of all others together.

`top-k` keeps k tokens of every position. `top-p` keeps as few as hold a share p of the probability, at most k: sure
positions take one or two, and the space goes where the teacher hesitates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import last_hidden

_CHUNK_TOKENS = 128
# Ids up to here fit 16 bits; torch has few operations on uint16, so they are stored shifted, as int16.
_SHORT_VOCABULARY = 2**16
_SHIFT = 2**15


@dataclass(frozen=True)
class Entries:
    """The likeliest tokens of each position of some blocks.

    Attributes:
        indices: int64 `[B, S, k]`, from the likeliest on; places beyond `counts` repeat the first.
        logprobs: fp32 `[B, S, k]`.
        tail: fp32 `[B, S]`, probability of all tokens that are not kept.
        counts: int64 `[B, S]`, how many are kept; None if it is k everywhere.
    """

    indices: Tensor
    logprobs: Tensor
    tail: Tensor
    counts: Tensor | None = None


@torch.no_grad()
def likeliest(
    teacher: PreTrainedModel, ids: Tensor, k: int, temperature: float, p: float | None = None
) -> Entries:
    """The teacher's likeliest next tokens.

    Args:
        teacher: a causal language model.
        ids: int64 `[B, S]`.
        k: most tokens of a position.
        temperature: divides the logits.
        p: share of the probability that is enough; None keeps k tokens everywhere.
    """
    hidden = last_hidden(teacher, ids.to(teacher.device)).flatten(0, 1)
    head = teacher.get_output_embeddings()
    parts = []
    for rows in hidden.split(_CHUNK_TOKENS):
        logprobs = torch.log_softmax(head(rows).float() / temperature, dim=-1)
        values, indices = logprobs.topk(k, dim=-1)
        mass = values.double().exp().cumsum(-1)
        counts = torch.full_like(indices[:, 0], k) if p is None else 1 + (mass < p).sum(-1).clamp(max=k - 1)
        kept = mass.gather(-1, counts.unsqueeze(-1) - 1).squeeze(-1)
        filler = torch.arange(k, device=counts.device) >= counts.unsqueeze(-1)
        indices = torch.where(filler, indices[:, :1], indices)
        values = torch.where(filler, values[:, :1], values)
        parts.append((indices.cpu(), values.cpu(), (1 - kept).clamp(min=0).float().cpu(), counts.cpu()))
    indices, values, tail, counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    shape = ids.shape
    return Entries(
        indices.view(*shape, k),
        values.view(*shape, k),
        tail.view(shape),
        None if p is None else counts.view(shape),
    )


def joined(parts: list[Entries]) -> Entries:
    """Entries of several batches as one."""
    counts = [part.counts for part in parts]
    return Entries(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail for part in parts]),
        None if counts[0] is None else torch.cat([c for c in counts if c is not None]),
    )


def bits_per_entry(vocabulary: int) -> int:
    """Stored bits of one kept token: its id and its log-probability in fp16."""
    return (16 if vocabulary <= _SHORT_VOCABULARY else 32) + 16


def encode(entries: Entries, vocabulary: int) -> dict[str, Tensor]:
    """The tensors of a shard: dense with k tokens everywhere, else end to end with counts and block offsets."""
    short = vocabulary <= _SHORT_VOCABULARY
    indices = (entries.indices - _SHIFT).to(torch.int16) if short else entries.indices.to(torch.int32)
    logprobs, tail = entries.logprobs.half(), entries.tail.contiguous()
    if entries.counts is None:
        return {"indices": indices, "logprobs": logprobs, "tail": tail}
    kept = torch.arange(indices.shape[-1]) < entries.counts.unsqueeze(-1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), entries.counts.sum(-1).cumsum(0)])
    return {
        "indices": indices[kept],
        "logprobs": logprobs[kept],
        "tail": tail,
        "counts": entries.counts.to(torch.int32),
        "offsets": offsets,
    }


def decode_block(file: safe_open, place: int) -> Entries:
    """One block's entries, `[S, k]` and `[S]`, from an open shard."""
    tail = file.get_slice("tail")[place]
    if "counts" not in file.keys():  # noqa: SIM118 - not a dictionary
        indices, logprobs = (file.get_slice(name)[place] for name in ("indices", "logprobs"))
        return Entries(_unshifted(indices), logprobs.float(), tail)
    begin, end = file.get_slice("offsets")[place : place + 2].tolist()
    indices, logprobs = (file.get_slice(name)[begin:end] for name in ("indices", "logprobs"))
    counts = file.get_slice("counts")[place].long()
    column = torch.arange(int(counts.max()))
    starts = counts.cumsum(0) - counts
    where = starts.unsqueeze(-1) + torch.where(column < counts.unsqueeze(-1), column, 0)
    return Entries(_unshifted(indices)[where], logprobs.float()[where], tail, counts)


def stacked(blocks: list[Entries]) -> Entries:
    """Blocks as a batch: narrower ones are filled up with their first token."""
    width = max(block.indices.shape[-1] for block in blocks)
    return Entries(
        torch.stack([_widened(block.indices, width) for block in blocks]),
        torch.stack([_widened(block.logprobs, width) for block in blocks]),
        torch.stack([block.tail for block in blocks]),
    )


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.cat([tensor, tensor[:, :1].expand(-1, width - tensor.shape[-1])], dim=-1)


def _unshifted(indices: Tensor) -> Tensor:
    return indices.long() + _SHIFT if indices.dtype == torch.int16 else indices.long()
