"""Divergence of a quantized model's output from the full-precision one's, as fast as a search needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import decoder
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks
from qatapult.trainer.search.switching import FULL_PRECISION, SwitchingModel

# Tokens whose logits are held at a time: for a vocabulary of 49,152, 50 MB in fp32.
_CHUNK_TOKENS = 256


class Divergence:
    """Mean KL(teacher ‖ student) a token over calibration text, in nats.

    The teacher's log-probabilities are computed once and kept in fp16 (for 2,048 tokens of a vocabulary of
    49,152: 200 MB). A measurement that differs from a reference assignment only from some block on starts at
        that block,
    with the hidden states that the reference had there.

    Args:
        switching: the model; it is laid on full precision here.
        text: calibration tokens, int64 `[blocks, block size]`.
    """

    def __init__(self, switching: SwitchingModel, text: Tensor) -> None:
        self.switching, self.text = switching, text
        self.reference: list[int] | None = None
        self._entering: list[Tensor] = []
        switching.set([FULL_PRECISION] * len(switching.groups))
        with torch.no_grad():
            hidden = self._hidden(0, None)
            rows = [log_softmax(part, dim=-1).half() for part in self._logits(hidden)]
        self._teacher = torch.cat(rows)

    @property
    def model(self) -> PreTrainedModel:
        model = self.switching.model
        assert isinstance(model, PreTrainedModel)
        return model

    @torch.no_grad()
    def set_reference(self, choice: Sequence[int]) -> float:
        """Measure an assignment and keep what enters each block, for later measurements near it."""
        self.switching.set(choice)
        self._entering = []
        handles = [
            block.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            for block in decoder_blocks(self.model)
        ]
        try:
            value = float(self._mean(self._hidden(0, None)))
        finally:
            for handle in handles:
                handle.remove()
        self.reference = list(choice)
        return value

    @torch.no_grad()
    def measure(self, choice: Sequence[int]) -> float:
        """Divergence of an assignment, in nats a token."""
        self.switching.set(choice)
        start = self._first_difference(choice)
        return float(self._mean(self._hidden(start, self._entering[start] if start else None)))

    def differentiable(self, rows: slice) -> Tensor:
        """Divergence of some of the blocks of text as a scalar with gradients, at the assignment in force."""
        hidden = decoder(self.model)(input_ids=self.text[rows], use_cache=False).last_hidden_state.flatten(
            0, 1
        )
        size = self.text.shape[1]
        teacher = self._teacher[(rows.start or 0) * size :][: len(hidden)].float()
        student = log_softmax(self.model.get_output_embeddings()(hidden).float(), dim=-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

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
        body = decoder(self.model)
        if entering is None:
            states = body(input_ids=self.text, use_cache=False).last_hidden_state
        else:
            with _from_block(self.model, start):
                states = body(inputs_embeds=entering, use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        head = self.model.get_output_embeddings()
        for part in hidden.split(_CHUNK_TOKENS):
            yield head(part).float()

    def _mean(self, hidden: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        for teacher, logits in zip(self._teacher.split(_CHUNK_TOKENS), self._logits(hidden), strict=True):
            wanted = teacher.float()
            total += (wanted.exp() * (wanted - log_softmax(logits, dim=-1))).sum(dtype=torch.float64)
        return total / len(hidden)

    def _keep_input(self, _: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Tensor]) -> None:
        self._entering.append(inputs[0] if inputs else arguments["hidden_states"])


@contextmanager
def _from_block(model: PreTrainedModel, start: int) -> Iterator[None]:
    """Let the decoder begin at a block: its inputs are then that block's."""
    body, blocks = decoder(model), decoder_blocks(model)
    name = next(name for name, child in body.named_children() if child is blocks)
    setattr(body, name, blocks[start:])
    try:
        yield
    finally:
        setattr(body, name, blocks)
