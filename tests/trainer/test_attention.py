"""Attention by products: the fused one's values and gradients, and only where gradients are needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qatapult.trainer.loop import attention
from qatapult.trainer.loop.attention import compose_attention, composed_attention
from qatapult.trainer.models import load_model
from qatapult.trainer.recipe.schema import Model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 4),
    length=st.integers(1, 17),
    size=st.integers(1, 9),
)
def test_values_and_gradients_are_those_of_the_fused_attention(
    batch: int, groups: int, repeats: int, length: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(length)

    def drawn(heads: int) -> Tensor:
        shape = (batch, heads, length, size)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    inputs = drawn(groups * repeats), drawn(groups), drawn(groups)
    ours = composed_attention(*inputs, 0.3)
    fused = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, fused)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((fused * weights).sum(), inputs),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_has_the_same_loss_and_gradients(padded: bool) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :5] = 1 - int(padded)
    losses, gradients = [], []
    for composed in (False, True):
        model = load_model(Model(source="random:tiny"))
        if composed:
            compose_attention(model)
        loss = model(input_ids=IDS, attention_mask=mask, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_evaluation_and_long_sequences_keep_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(Model(source="random:tiny"))
    compose_attention(model)
    calls: list[int] = []

    def counted(query: Tensor, *more: Tensor | float) -> Tensor:
        calls.append(query.shape[2])
        return composed_attention(query, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "composed_attention", counted)
    with torch.no_grad():
        model(input_ids=IDS)
    assert calls == []
    monkeypatch.setattr(attention, "LONGEST", 23)
    model(input_ids=IDS)
    assert calls == []
    model(input_ids=IDS[:, :23])
    assert calls == [23, 23]
    assert "attn" not in "".join(model.config.to_diff_dict())  # nothing of it is exported
