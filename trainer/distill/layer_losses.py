"""Losses between layers of student and teacher: hidden states, and self-attention relations.

Both are sums over the tokens that count of a mean over layer pairs, so that they add up over micro-batches and
processes as the divergence of the logits does. Everything is computed in fp32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qatapult.trainer.distill.layers import LayerStates, Pairing
from qatapult.trainer.recipe.schema import HiddenLoss

# Logits of relations that are held at a time: 2^23 in fp32 are 32 MiB.
_RELATION_ELEMENTS = 2**23


def hidden_loss(
    student: LayerStates, teacher: LayerStates, pairing: Pairing, counted: Tensor, settings: HiddenLoss
) -> Tensor:
    """Distance of hidden states: for each token the mean over layer pairs, summed over the tokens.

    With s and t a token's hidden states of D features in student and teacher:

    * `mse`: |s − t|² / D, and with `normalize` |s − t|² / |t|², so that layers and tokens of large states (the
      first token's are hundreds of times the others') do not outweigh the rest;
    * `cosine`: 1 − s·t / (|s| |t|).

    Args:
        student: tapped from the student.
        teacher: tapped from the teacher.
        pairing: which belongs to which.
        counted: bool `[B, S]`, the tokens that count.
        settings: which distance.

    Returns:
        fp32 scalar.
    """
    terms = [
        (_distance(student.hidden[own], teacher.hidden[other], settings) * counted).sum()
        for own, other in pairing.hidden
    ]
    return torch.stack(terms).mean()


def attention_loss(
    student: LayerStates, teacher: LayerStates, pairing: Pairing, counted: Tensor, heads: int
) -> Tensor:
    """Divergence of self-attention relations (MiniLMv2, arXiv:2012.15828, section 3.1), summed over the tokens.

    A relation of a token says how its query (key, value) resembles those of the tokens before it and its own:
    softmax(q_i · q_j / √d over j ≤ i). The loss of a token is KL(teacher ‖ student), averaged over relation heads,
    kinds of projection and layer pairs. MiniLMv2 has encoders; here a token sees what a decoder's does. The
    projections are taken before the rotary embedding. No attention map is needed, so any attention kernel may run,
    and the relations themselves are held a few rows at a time and computed again in the backward pass.

    Args:
        student: tapped from the student.
        teacher: tapped from the teacher; may have another width and other heads.
        pairing: which belongs to which.
        counted: bool `[B, S]`, the tokens that count.
        heads: relation heads.

    Returns:
        fp32 scalar.
    """
    terms = [
        _relation_loss(
            _cut(student.projections[own, kind], heads),
            _cut(teacher.projections[other, kind], heads),
            counted,
        )
        for own, other in pairing.attention
        for kind in pairing.relations
    ]
    return torch.stack(terms).mean()


def _distance(student: Tensor, teacher: Tensor, settings: HiddenLoss) -> Tensor:
    """`[B, S, D]` and `[B, S, D]` to `[B, S]`."""
    student, teacher = _precise(student), _precise(teacher)
    if settings.loss == "cosine":
        return 1 - torch.cosine_similarity(student, teacher, dim=-1)
    squares = (student - teacher).square().mean(-1)
    if settings.normalize:
        squares = squares / teacher.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return squares


def _cut(projection: Tensor, heads: int) -> Tensor:
    """`[B, S, width]` to `[B, heads, S, width / heads]`."""
    return projection.unflatten(-1, (heads, -1)).transpose(1, 2)


def _relation_loss(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Sum over counted tokens of the mean over heads; student `[B, h, S, d]`, teacher `[B, h, S, e]`."""
    batch, heads, length, _ = student.shape
    rows = max(1, _RELATION_ELEMENTS // (batch * heads * length))
    terms = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        losses = checkpoint(
            _row_losses, student, teacher, start, end, use_reentrant=False, preserve_rng_state=False
        )
        terms.append((losses.mean(1) * counted[:, start:end]).sum())
    return torch.stack(terms).sum()


def _row_losses(student: Tensor, teacher: Tensor, start: int, end: int) -> Tensor:
    """KL of the relations of tokens `start` to `end`, `[B, h, end − start]`."""
    later = torch.ones(end - start, end, dtype=torch.bool, device=student.device).triu(start + 1)
    own, other = (_log_relations(states, start, end, later) for states in (student, teacher))
    # Later tokens have probability 0 in both: 0 · (−inf + inf) must not become NaN.
    difference = (other - own).masked_fill(later, 0)
    return (other.exp() * difference).sum(-1)


def _log_relations(states: Tensor, start: int, end: int, later: Tensor) -> Tensor:
    """Log-softmax of scaled products with the tokens up to each, fp32 `[B, h, end − start, end]`."""
    with torch.autocast(states.device.type, enabled=False):
        states = _precise(states)
        products = states[:, :, start:end] @ states[:, :, :end].transpose(-1, -2) / states.shape[-1] ** 0.5
        return products.masked_fill(later, float("-inf")).log_softmax(-1)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
