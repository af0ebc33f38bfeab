"""Divergence of a quantized model's output from the full-precision one's, as fast as a search needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.blocks import hidden_from_block, keeping_inputs
from qatapult.trainer.evaluate.perplexity import decoder, last_hidden
from qatapult.trainer.search.switching import FULL_PRECISION, SwitchingLinear, SwitchingModel

# Tokens whose logits are held at a time: for a vocabulary of 49,152, 12 MB in fp32, which caches hold.
_CHUNK_TOKENS = 64


class Divergence:
    """Mean KL(teacher ‖ student) a token over calibration text, in nats.

    With p the teacher's probabilities and W·h the student's logits, everything of the teacher that

        KL = Σ p log p − (Σ p w)·h + logsumexp(W·h)

    needs is a number and a vector a token, computed once: a measurement goes over the vocabulary only for the
    last term. One that differs from a reference assignment only from some block on starts at that block, with
    the hidden states that the reference had there.

    Args:
        switching: the model; it is laid on full precision here.
        text: calibration tokens, int64 `[blocks, block size]`.
    """

    def __init__(self, switching: SwitchingModel, text: Tensor) -> None:
        self.switching, self.text = switching, text
        self.reference: list[int] | None = None
        self._entering: list[Tensor] = []
        switching.set([FULL_PRECISION] * len(switching.groups))
        head = self.model.get_output_embeddings()
        # A head that is searched itself changes, inputs included; then the teacher's logits are needed whole.
        self._fixed_head = not isinstance(head, SwitchingLinear) and head.bias is None
        self._teacher_head = head.weight.detach().clone()
        self._teacher_bias = None if head.bias is None else head.bias.detach().clone()
        with torch.no_grad():
            if self._fixed_head:
                # What is common to all tokens of the vocabulary changes no probability, and rounds worse.
                self._teacher_head -= self._teacher_head.mean(0)
                self._fast_head = self._teacher_head.to(_head_dtype())
            self._teacher = self._hidden(0, None)
            if self._fixed_head:
                parts = [self._summary(rows) for rows in self._teacher.split(_CHUNK_TOKENS)]
                self._aim, self._entropy = (torch.cat(part) for part in zip(*parts, strict=True))

    @property
    def model(self) -> PreTrainedModel:
        model = self.switching.model
        assert isinstance(model, PreTrainedModel)
        return model

    @torch.no_grad()
    def set_reference(self, choice: Sequence[int]) -> float:
        """Measure an assignment and keep what enters each block, for later measurements near it."""
        self.switching.set(choice)
        with keeping_inputs(self.model) as self._entering:
            value = self._mean(self._hidden(0, None))
        self.reference = list(choice)
        return value

    @torch.no_grad()
    def measure(self, choice: Sequence[int]) -> float:
        """Divergence of an assignment, in nats a token."""
        self.switching.set(choice)
        start = self._first_difference(choice)
        return self._mean(self._hidden(start, self._entering[start] if start else None))

    def differentiable(self, rows: slice) -> Tensor:
        """Divergence of some of the blocks of text as a scalar with gradients, at the assignment in force."""
        states = decoder(self.model)(input_ids=self.text[rows], use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1)
        first = (rows.start or 0) * self.text.shape[1]
        return self._divergences(hidden, first).mean()

    def _first_difference(self, choice: Sequence[int]) -> int:
        """The first block that computes something else than in the reference; 0 where that is unknown."""
        if self.reference is None:
            return 0
        changed = [
            group.block
            for group, old, new in zip(self.switching.groups, self.reference, choice, strict=True)
            if old != new
        ]
        blocks = [block for block in changed if block is not None]
        if len(blocks) < len(changed):
            return 0
        return min(blocks, default=len(self._entering) - 1)

    def _hidden(self, start: int, entering: Tensor | None) -> Tensor:
        if entering is None:
            return last_hidden(self.model, self.text).flatten(0, 1)
        return hidden_from_block(self.model, start, entering).flatten(0, 1)

    def _summary(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Σ p w `[tokens, D]` and Σ p log p `[tokens]` of the teacher's last hidden states."""
        found = log_softmax(linear(rows, self._teacher_head), dim=-1)
        chances = found.exp()
        return chances @ self._teacher_head, (chances * found).sum(-1)

    def _divergences(self, hidden: Tensor, first: int) -> Tensor:
        """KL of each token from the student's last hidden states, the first of which is token `first`."""
        tokens = slice(first, first + len(hidden))
        head = self.model.get_output_embeddings()
        if not self._fixed_head:
            target = log_softmax(
                linear(self._teacher[tokens], self._teacher_head, self._teacher_bias), dim=-1
            )
            return (target.exp() * (target - log_softmax(head(hidden).float(), dim=-1))).sum(-1)
        weight = self._teacher_head if torch.is_grad_enabled() else self._fast_head
        logits = linear(hidden.to(weight.dtype), weight)
        agreement = (self._aim[tokens] * hidden).sum(-1)
        return self._entropy[tokens] - agreement + logits.float().logsumexp(-1)

    def _mean(self, hidden: Tensor) -> float:
        total = 0.0
        for first in range(0, len(hidden), _CHUNK_TOKENS):
            rows = hidden[first : first + _CHUNK_TOKENS]
            total += float(self._divergences(rows, first).sum(dtype=torch.float64))
        return total / len(hidden)


def _head_dtype() -> torch.dtype:
    """The dtype of the head's product: bf16 where the processor multiplies it."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
