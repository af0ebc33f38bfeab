"""The student's forward pass and its loss, as one module that every engine can wrap.

The loss is computed inside `forward`, where FSDP2 and ZeRO-3 have gathered the output head, and it is fused with
both heads, so that the logits of a batch are never held.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qatapult.kernels import distillation_loss, topk_distillation_loss
from qatapult.trainer.distill.layer_losses import attention_loss, hidden_loss
from qatapult.trainer.distill.layers import LayerStates, Pairing, Taps, relation_heads, tapped
from qatapult.trainer.evaluate.perplexity import last_hidden, token_losses
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.recipe.schema import Distillation

IGNORED = -100


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher says about a batch.

    Attributes:
        hidden: last hidden states, `[B, S, D_teacher]`; None with cached logits.
        head: the teacher's output head, `[V, D_teacher]`; None with cached logits.
        top_indices: int64 `[B, S, k]`, from the cache.
        top_logprobs: `[B, S, k]`, from the cache.
        tail_mass: `[B, S]`, probability outside the k tokens.
        pairing: which of the student's layers are compared with which of the teacher's.
        layers: what the teacher's layers of the pairing gave.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    top_indices: Tensor | None = None
    top_logprobs: Tensor | None = None
    tail_mass: Tensor | None = None
    pairing: Pairing = field(default_factory=Pairing)
    layers: LayerStates = field(default_factory=LayerStates)


@dataclass(frozen=True)
class LossParts:
    """Sums over the tokens of a batch, so that processes can average over all tokens.

    Attributes:
        loss: scalar with a gradient.
        kl: detached scalar.
        tokens: how many tokens the sums are over.
        hidden: detached scalar, distance of hidden states before its weight; None where it is not asked for.
        attention: detached scalar, likewise of attention relations.
    """

    loss: Tensor
    kl: Tensor
    tokens: int
    hidden: Tensor | None = None
    attention: Tensor | None = None


class Student(nn.Module):
    """A causal language model together with its training loss.

    Args:
        model: the model, prepared for quantization (or not: the full-precision control trains the same way).
        distillation: the loss.
    """

    def __init__(self, model: PreTrainedModel, distillation: Distillation) -> None:
        super().__init__()
        self.model = model
        # FSDP2 asks the module that it shards, which is this one, what its units are.
        self._no_split_modules = list(getattr(model, "_no_split_modules", None) or ())
        self.distillation = distillation

    def forward(
        self, ids: Tensor, present: Tensor | None = None, teacher: TeacherSignal | None = None
    ) -> LossParts | Tensor:
        """Training loss of a batch, or token losses for evaluation.

        Args:
            ids: int64 `[B, S]`.
            present: bool `[B]`, False for blocks that only fill up a batch; None to evaluate.
            teacher: None when training on the text alone.

        Returns:
            `LossParts` for training; token losses, fp32 `[B, S − 1]`, for evaluation.
        """
        if present is None:
            return token_losses(self.model, ids)
        with tapped(self.model, Taps() if teacher is None else teacher.pairing.student) as layers:
            hidden = last_hidden(self.model, ids)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        labels = labels.masked_fill(~present[:, None], IGNORED)
        if teacher is None:
            return self._text_loss(hidden, labels)
        parts = self._distillation_loss(hidden, labels, present, teacher)
        counted = present[:, None].expand(ids.shape)
        if self.distillation.cross_entropy:
            counted = counted & (labels != IGNORED)
        return self._with_layers(parts, layers, teacher, counted)

    def head_weight(self) -> Tensor:
        """The output head as the forward pass uses it, `[V, D]`."""
        head = self.model.get_output_embeddings()
        return head.fake_quantized_weight() if isinstance(head, QuantizedWeight) else head.weight

    def _distillation_loss(
        self, hidden: Tensor, labels: Tensor, present: Tensor, teacher: TeacherSignal
    ) -> LossParts:
        options = {
            "kind": self.distillation.kind,
            "temperature": self.distillation.temperature,
            "beta": self.distillation.beta,
            "ce_weight": self.distillation.cross_entropy,
            "labels": labels if self.distillation.cross_entropy else None,
            "mask": present[:, None].expand(hidden.shape[:-1]),
            "reduction": "sum",
            "return_parts": True,
        }
        if teacher.hidden is not None:
            loss, parts = distillation_loss(
                hidden, self.head_weight(), teacher.hidden, teacher.head, **options
            )
        else:
            loss, parts = topk_distillation_loss(
                hidden,
                self.head_weight(),
                teacher.top_indices,
                teacher.top_logprobs,
                teacher.tail_mass,
                **options,
            )
        return LossParts(loss, parts["kl"], int(parts["tokens"]))

    def _with_layers(
        self, parts: LossParts, layers: LayerStates, teacher: TeacherSignal, counted: Tensor
    ) -> LossParts:
        """Add the losses between layers that the recipe asks for."""
        hidden, attention = self.distillation.hidden, self.distillation.attention
        if hidden is not None and teacher.pairing.hidden:
            term = hidden_loss(layers, teacher.layers, teacher.pairing, counted, hidden)
            parts = replace(parts, loss=parts.loss + hidden.weight * term, hidden=term.detach())
        if attention is not None and teacher.pairing.attention:
            heads = relation_heads(attention, self.model.config)
            term = attention_loss(layers, teacher.layers, teacher.pairing, counted, heads)
            parts = replace(parts, loss=parts.loss + attention.weight * term, attention=term.detach())
        return parts

    def _text_loss(self, hidden: Tensor, labels: Tensor) -> LossParts:
        logits = nn.functional.linear(hidden, self.head_weight()).flatten(0, 1)
        loss = cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return LossParts(loss, torch.zeros_like(loss), int((labels != IGNORED).sum()))
