"""What single layers give: tapped inside the forward pass, and which layer of the teacher belongs to which.

The taps are forward hooks that live as long as one forward pass. They see what the layer computes on every
engine: under FSDP2 and ZeRO-3 its weights are gathered then, and under gradient checkpointing the tapped tensors
are ordinary ones of the graph (the hooks are gone when the layer is computed a second time).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.perplexity import decoder
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import AttentionLoss, Distillation, HiddenLoss, Relation

#: Names of the linears whose outputs are related.
_PROJECTIONS: dict[Relation, str] = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


@dataclass(frozen=True)
class LayerStates:
    """What was tapped.

    Attributes:
        hidden: outputs `[B, S, D]` by layer.
        projections: outputs `[B, S, width]` of query, key and value projections by layer and kind.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[tuple[int, Relation], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairing:
    """Which layers are compared: pairs of a student's and a teacher's layer, from 0.

    Attributes:
        hidden: pairs whose outputs are compared.
        attention: pairs whose projections are.
        relations: which projections.
    """

    hidden: tuple[tuple[int, int], ...] = ()
    attention: tuple[tuple[int, int], ...] = ()
    relations: tuple[Relation, ...] = ()

    @property
    def student(self) -> Taps:
        """What to tap in the student."""
        return Taps(_side(self.hidden, 0), _side(self.attention, 0), self.relations)

    @property
    def teacher(self) -> Taps:
        """What to tap in the teacher."""
        return Taps(_side(self.hidden, 1), _side(self.attention, 1), self.relations)


@dataclass(frozen=True)
class Taps:
    """Layers of one model whose outputs (`hidden`) or projections (`attention`) are wanted."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relations: tuple[Relation, ...] = ()


@contextmanager
def tapped(model: PreTrainedModel, taps: Taps) -> Iterator[LayerStates]:
    """Collect what layers give in the forward pass inside the context.

    Args:
        model: a causal language model whose decoder has `layers`.
        taps: what is wanted.
    """
    states = LayerStates()
    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(partial(_keep, states.hidden, i)) for i in taps.hidden]
    for i in taps.attention:
        for kind in taps.relations:
            linear = projection(layers[i], kind)
            handles.append(linear.register_forward_hook(partial(_keep, states.projections, (i, kind))))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def pair_layers(distillation: Distillation, student: Any, teacher: Any) -> Pairing:
    """Which layers the recipe compares.

    Args:
        distillation: the recipe's losses.
        student: the student's transformers configuration.
        teacher: the teacher's.

    Raises:
        UserError: if a layer does not exist, or the two models' sizes do not go together.
    """
    hidden, attention = distillation.hidden, distillation.attention
    if hidden is not None and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"qat.distillation.hidden compares hidden states of one size, and the teacher has {teacher.hidden_size}, "
            f"the student {student.hidden_size}; use qat.distillation.attention, whose relations fit any size"
        )
    if attention is not None:
        for config in (student, teacher):
            _check_heads(attention, relation_heads(attention, student), config)
    return Pairing(
        _pairs(hidden, "hidden", student, teacher),
        _pairs(attention, "attention", student, teacher),
        () if attention is None else attention.relations,
    )


def relation_heads(attention: AttentionLoss, student: Any) -> int:
    """Heads that projections are cut into: the recipe's, or the student's key and value heads."""
    return int(attention.heads or getattr(student, "num_key_value_heads", student.num_attention_heads))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        UserError: if the model has no list of that name.
    """
    layers = getattr(decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"qat.distillation: {type(model).__name__} has no decoder layers to compare; remove hidden and attention"
        )
    return layers


def projection(layer: nn.Module, kind: Relation) -> nn.Module:
    """A layer's query, key or value projection.

    Raises:
        UserError: if it has none of its own (some models compute all three in one product).
    """
    name = _PROJECTIONS[kind]
    found = next((module for path, module in layer.named_modules() if path.endswith(f".{name}")), None)
    if found is None:
        raise UserError(f"qat.distillation.attention: {type(layer).__name__} has no {name}; remove attention")
    return found


def _keep(states: dict[Any, Tensor], key: Any, module: nn.Module, inputs: Any, output: Any) -> None:
    states[key] = output[0] if isinstance(output, tuple) else output


def _side(pairs: tuple[tuple[int, int], ...], side: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(pair[side] for pair in pairs))


def _pairs(
    loss: HiddenLoss | AttentionLoss | None, name: str, student: Any, teacher: Any
) -> tuple[tuple[int, int], ...]:
    """Layer pairs of one loss. `auto` maps layer i of S to layer ceil((i + 1) · T / S) − 1 of T (TinyBERT's uniform
    mapping, arXiv:1909.10351, section 3.1), which is i where both are equally deep.
    """
    if loss is None:
        return ()
    depth, teacher_depth = student.num_hidden_layers, teacher.num_hidden_layers
    if loss.pairs == "last":
        return ((depth - 1, teacher_depth - 1),)
    if loss.pairs == "auto":
        return tuple((i, -(-(i + 1) * teacher_depth // depth) - 1) for i in range(depth))
    for own, other in loss.pairs:
        if not (0 <= own < depth and 0 <= other < teacher_depth):
            raise UserError(
                f"qat.distillation.{name}.pairs: [{own}, {other}] is no pair of layers; the student has "
                f"0 … {depth - 1}, the teacher 0 … {teacher_depth - 1}"
            )
    return loss.pairs


def _check_heads(attention: AttentionLoss, heads: int, config: Any) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    widths = {"query": config.num_attention_heads, "key": key_heads, "value": key_heads}
    for kind in attention.relations:
        if widths[kind] * size % heads:
            raise UserError(
                f"qat.distillation.attention.heads: {heads} heads do not divide a {kind} projection of "
                f"{widths[kind] * size} features; set a number that divides the projections of student and teacher"
            )
