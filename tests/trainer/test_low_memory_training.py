"""Training with little memory: adapters that merge onto the grid, and block by block."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qatapult.trainer.loop import blockwise_disk
from qatapult.trainer.loop.blockwise import train_blockwise
from qatapult.trainer.loop.blockwise_disk import load_trained_blocks, train_blockwise_from_disk
from qatapult.trainer.loop.optimizer import build_optimizer, select_trainable
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Model, Recipe
from qatapult.trainer.weight_files import WeightFiles

CPU = torch.device("cpu")


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


class Sampler:
    """Most parameters that were off the meta device when an embedding or a block computed."""

    def __init__(self) -> None:
        self.most, self.calls = 0, 0

    def __call__(self, module: nn.Module | None = None, _: object = None) -> None:
        if not (module is None or isinstance(module, nn.Embedding) or hasattr(module, "self_attn")):
            return
        self.calls += 1
        if isinstance(module, nn.Module) and not isinstance(module, nn.Embedding) and self.calls % 3:
            return  # looking at every object takes a while, and each block computes a dozen times
        alive = {id(o): o for o in gc.get_objects() if type(o) is nn.Parameter and not o.is_meta}
        self.most = max(self.most, sum(parameter.numel() for parameter in alive.values()))


def on_disk(folder: Path, recipe: Recipe, model: nn.Module) -> Path:
    """What post-training quantization leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "ptq.safetensors"))
    return folder / "ptq.safetensors"


@pytest.mark.parametrize("source", ["random:tiny", "folder"])
def test_blocks_from_disk_give_what_blocks_in_memory_give(tmp_path: Path, source: str) -> None:
    options = ["qat.blockwise_tokens=1024", "qat.optimizer.learning_rate=0.002"]
    if source == "folder":
        load_model(Model(source="random:tiny")).save_pretrained(tmp_path / "model", max_shard_size="100KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
        options.append(f"model.source={tmp_path / 'model'}")
    recipe, teacher, model, ids = small(*options)
    weights = on_disk(tmp_path, recipe, model)
    expected = train_blockwise(model, teacher, ids, recipe, lambda _: None)
    found = train_blockwise_from_disk(weights, recipe, ids, tmp_path / "disk", CPU, lambda _: None)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    _, _, loaded, _ = small(*options)
    load_trained_blocks(loaded, tmp_path / "disk")
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=name)
    assert not list((tmp_path / "disk" / "activations").iterdir())


def test_blocks_from_disk_hold_one_block_in_memory(tmp_path: Path) -> None:
    recipe, teacher, model, ids = small("qat.blockwise_tokens=512")
    weights = on_disk(tmp_path, recipe, model)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    WeightFiles.of(recipe.model, tmp_path / "disk" / "source")  # drawing random weights takes the whole model
    del model, teacher
    gc.collect()
    sampler, before = Sampler(), Sampler()
    before()
    handle = register_module_forward_pre_hook(sampler)
    try:
        train_blockwise_from_disk(weights, recipe, ids, tmp_path / "disk", CPU, lambda _: None)
    finally:
        handle.remove()
    # The embedding table comes alone, before any block.
    assert sampler.most - before.most <= block < whole / 2


def test_blocks_from_disk_go_on_where_they_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, model, ids = small("qat.blockwise_tokens=512")
    weights = on_disk(tmp_path, recipe, model)
    expected = train_blockwise_from_disk(weights, recipe, ids, tmp_path / "whole", CPU, lambda _: None)
    trained: list[int] = []

    def once(*arguments: object) -> tuple[float, float]:
        trained.append(len(trained))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    original = blockwise_disk.train_block
    monkeypatch.setattr(blockwise_disk, "train_block", once)
    with pytest.raises(KeyboardInterrupt):
        train_blockwise_from_disk(weights, recipe, ids, tmp_path / "killed", CPU, lambda _: None)
    found = train_blockwise_from_disk(weights, recipe, ids, tmp_path / "killed", CPU, lambda _: None)
    assert len(trained) == 3  # the first block was not trained again
    assert found == expected
    for file in (tmp_path / "whole").glob("block-*.safetensors"):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()
