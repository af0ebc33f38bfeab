"""Losses between layers: against plain formulas, with gradients, under recomputation, and refused where senseless."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qatapult.trainer.distill import layer_losses
from qatapult.trainer.distill.layers import pair_layers
from qatapult.trainer.distill.student import Student
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Distillation, Model, Quantization
from qatapult.trainer.shapes import RANDOM_SHAPES

IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
PRESENT = torch.tensor([True, True, False])
WIDER = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
ALL = torch.arange(3)


def models(**teacher_shape: Any) -> tuple[nn.Module, nn.Module]:
    """A student at 4 bits, and its teacher: its original, or a random model of another shape."""
    original = load_model(Model(source="random:tiny"))
    student = prepare(copy.deepcopy(original), Quantization(weights={"bits": 4}, activations=None))
    if teacher_shape:
        torch.manual_seed(1)
        config = AutoConfig.for_model(**(RANDOM_SHAPES["tiny"] | teacher_shape))
        original = AutoModelForCausalLM.from_config(config).eval()
    return student, original


def parts(student: nn.Module, teacher: nn.Module, **losses: Any) -> Any:
    distillation = Distillation.model_validate(losses)
    pairing = pair_layers(distillation, student.config, teacher.config)
    signal = InProcessTeacher(teacher, pairing=pairing).signal(IDS, ALL)
    return Student(student, distillation)(IDS, PRESENT, signal)


def layer_outputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Output of each layer, by transformers' own account (which norms the last one: undone here by hooks)."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, i, o: seen.append(o if isinstance(o, Tensor) else o[0]))
        for layer in model.model.layers
    ]
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return tuple(seen)


def test_hidden_distance_is_its_formula() -> None:
    student, teacher = models()
    with torch.no_grad():
        own, other = layer_outputs(student), layer_outputs(teacher)
    squares = cosines = relative = 0.0
    for s, t in zip(own, other, strict=True):
        for b in range(2):  # the third block is filler
            for i in range(IDS.shape[1]):
                a, c = s[b, i].double(), t[b, i].double()
                squares += float(((a - c) ** 2).mean())
                relative += float(((a - c) ** 2).sum() / (c**2).sum())
                cosines += float(1 - a @ c / (a.norm() * c.norm()))
    for settings, expected in (
        ({"normalize": False}, squares),
        ({}, relative),
        ({"loss": "cosine"}, cosines),
    ):
        measured = parts(student, teacher, hidden=settings).hidden
        assert float(measured) == pytest.approx(expected / len(own), rel=1e-4)


def relation_divergence(own: Tensor, other: Tensor, heads: int) -> float:
    """The formula of `attention_loss` for one block and kind of projection, token by token."""
    total = 0.0
    for head in range(heads):
        s, t = (x.double().unflatten(-1, (heads, -1))[:, head] for x in (own, other))
        for i in range(len(s)):
            p = torch.softmax(t[: i + 1] @ t[i] / math.sqrt(t.shape[1]), 0)
            q = torch.softmax(s[: i + 1] @ s[i] / math.sqrt(s.shape[1]), 0)
            total += float((p * (p.log() - q.log())).sum()) / heads
    return total


@pytest.mark.parametrize("rows", [1, 2**23])
def test_relations_are_their_formula(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher of another width, whole and one row at a time."""
    monkeypatch.setattr(layer_losses, "_RELATION_ELEMENTS", rows)
    student, teacher = models(**WIDER)
    measured = parts(student, teacher, attention={"heads": 4}).attention
    expected = 0.0
    for name in ("q_proj", "k_proj", "v_proj"):
        seen: list[Tensor] = []
        for model in (student, teacher):
            linear = model.model.layers[-1].self_attn.get_submodule(name)
            handle = linear.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
            with torch.no_grad():
                model(input_ids=IDS)
            handle.remove()
        expected += sum(relation_divergence(seen[0][b], seen[1][b], heads=4) for b in range(2)) / 3
    assert float(measured) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["hidden", "attention"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, teacher = models()
    student = load_model(Model(source="random:tiny")).double()  # smooth: no rounding inside
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    teacher = teacher.double()
    weight = student.model.layers[0].self_attn.k_proj.weight

    def loss() -> Tensor:
        return parts(student, teacher, **{name: {"pairs": "auto", "weight": 7.0}}).loss

    loss().backward()
    place, step = (3, 5), 1e-3  # the norms compute in fp32
    with torch.no_grad():
        weight[place] += step
        above = float(loss())
        weight[place] -= 2 * step
        below = float(loss())
    assert float(weight.grad[place]) == pytest.approx((above - below) / (2 * step), rel=5e-2)


def test_a_student_that_equals_its_teacher_loses_nothing() -> None:
    _, teacher = models()
    measured = parts(copy.deepcopy(teacher), teacher, hidden={}, attention={"pairs": "auto"})
    assert float(measured.hidden) == 0
    assert float(measured.attention) == pytest.approx(0, abs=1e-5)
    assert float(measured.loss) == pytest.approx(0, abs=1e-4)


def test_recomputed_layers_give_the_same_gradients() -> None:
    student, teacher = models()
    gradients = []
    for recompute in (False, True):
        model = copy.deepcopy(student).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parts(model, teacher, hidden={}, attention={}).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_loss_is_the_weighted_sum() -> None:
    student, teacher = models()
    plain = parts(student, teacher)
    both = parts(student, teacher, hidden={"weight": 0.5}, attention={"weight": 3.0})
    assert float(both.kl) == pytest.approx(float(plain.kl))
    assert float(both.loss) == pytest.approx(
        float(plain.loss) + 0.5 * float(both.hidden) + 3 * float(both.attention), rel=1e-5
    )
    assert plain.hidden is None
    assert plain.attention is None


def test_layers_of_a_deeper_teacher_are_spread() -> None:
    student, teacher = models(num_hidden_layers=6)
    pairing = pair_layers(Distillation.model_validate({"hidden": {}}), student.config, teacher.config)
    assert pairing.hidden == ((0, 2), (1, 5))


@pytest.mark.parametrize(
    ("shape", "losses", "message"),
    [
        (WIDER, {"hidden": {}}, "has 96, the student 64"),
        ({}, {"hidden": {"pairs": [[0, 2]]}}, r"\[0, 2\] is no pair"),
        ({}, {"attention": {"heads": 5}}, "5 heads do not divide a query projection of 64"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    shape: dict[str, Any], losses: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parts(*models(**shape), **losses)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["qat.distillation.cache=somewhere"], "a cache holds its logits alone"),
        (["qat.distillation.kind=none"], "needs a teacher"),
        (["ptq.methods=[rtn, hadamard]"], "'hadamard' rotates"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("tiny-random-w4a8", ["qat.distillation.hidden={weight: 1}", *overrides])
