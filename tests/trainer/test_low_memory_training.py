"""Training with little memory: adapters that merge onto the grid, and block by block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qatapult.trainer.loop.blockwise import train_blockwise
from qatapult.trainer.loop.optimizer import build_optimizer, select_trainable
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe


def small(*overrides: str) -> tuple[Recipe, nn.Module, nn.Module, torch.Tensor]:
    """A recipe, its full-precision model, the prepared one, and text."""
    recipe = load_recipe("tiny-random-w4a8", ["quantization.weights.bits=2", "export=[]", *overrides])
    teacher = load_model(recipe.model)
    model = prepare(copy.deepcopy(teacher), recipe.quantization)
    ids = torch.randint(0, teacher.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    return recipe, teacher, model, ids


def train(model: nn.Module, teacher: nn.Module, ids: torch.Tensor, recipe: Recipe, steps: int) -> list[float]:
    select_trainable(model, recipe.qat.trainable)
    optimizer = build_optimizer(model, recipe, steps)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            goal = teacher(input_ids=ids).logits
        loss = (model(input_ids=ids).logits - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapters_change_nothing_until_they_train() -> None:
    _, _, model, ids = small()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        lora.add_adapters(model, rank=4)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_only_adapters_and_scales_train_and_the_loss_falls() -> None:
    recipe, teacher, model, ids = small("qat.trainable=lora")
    lora.add_adapters(model, rank=8)
    frozen = {name: layer.weight.detach().clone() for name, layer in quant_layers(model).items()}
    losses = train(model, teacher, ids, recipe, steps=30)
    assert losses[-1] < 0.9 * losses[0]
    for name, layer in quant_layers(model).items():
        assert torch.equal(layer.weight, frozen[name])
        assert layer.lora_up.abs().sum() > 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.5 * sum(weight.numel() for weight in frozen.values())


def test_merging_changes_no_code_and_leaves_no_adapter() -> None:
    recipe, teacher, model, ids = small("qat.trainable=lora")
    lora.add_adapters(model, rank=8)
    train(model, teacher, ids, recipe, steps=5)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    codes = {name: layer.codes() for name, layer in quant_layers(model).items()}
    _, _, plain, _ = small()
    plain.load_state_dict(lora.merged(model.state_dict()))
    for name, layer in quant_layers(plain).items():
        assert torch.equal(layer.codes(), codes[name])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
        torch.testing.assert_close(
            convert(model)(input_ids=ids).logits, convert(plain)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", ["lsq", "minmax"])
def test_block_by_block_brings_every_block_nearer_to_its_original(method: str) -> None:
    recipe, teacher, _, ids = small("qat.blockwise_tokens=2048", "qat.optimizer.learning_rate=0.002")
    model = prepare(copy.deepcopy(teacher), recipe.quantization, method)  # type: ignore[arg-type]
    with torch.no_grad():
        goal = teacher(input_ids=ids).logits
        before = (model(input_ids=ids).logits - goal).square().mean()
    heard: list[str] = []
    errors = train_blockwise(model, teacher, ids, recipe, heard.append)
    with torch.no_grad():
        after = (model(input_ids=ids).logits - goal).square().mean()
    assert len(errors) == len(heard) == teacher.config.num_hidden_layers
    assert all(trained < begun for begun, trained in errors)
    assert after < 0.9 * before


def test_block_by_block_never_ends_worse_than_it_began() -> None:
    recipe, teacher, model, ids = small("qat.blockwise_tokens=512", "qat.optimizer.learning_rate=10.0")
    begun = {name: layer.codes() for name, layer in quant_layers(model).items()}
    errors = train_blockwise(model, teacher, ids, recipe, lambda _: None)
    assert all(trained <= before for before, trained in errors)
    assert all(torch.equal(layer.codes(), begun[name]) for name, layer in quant_layers(model).items())
