"""Exports, each loaded again by the runtime that it is for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.evaluate.parity import arithmetic
from qatapult.trainer.evaluate.perplexity import token_losses
from qatapult.trainer.export.shards import ShardWriter
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Model, Quantization, TensorScheme

A8 = TensorScheme(bits=8, granularity="token")
W4 = TensorScheme(bits=4)
W4_GROUP = TensorScheme(bits=4, granularity="group", group_size=32)
GRIDS = {
    "w4a8": Quantization(weights=W4, activations=A8),
    "w4a8-g64": Quantization(
        weights=TensorScheme(bits=4, granularity="group", group_size=64), activations=A8
    ),
    "w8a8": Quantization(weights=TensorScheme(bits=8), activations=A8),
    "w4a16-g32": Quantization(weights=W4_GROUP, activations=None),
    "w8a16": Quantization(weights=TensorScheme(bits=8), activations=None),
    "w4a16-asymmetric": Quantization(
        weights=W4_GROUP.model_copy(update={"symmetric": False}), activations=None
    ),
    "gguf-q4_0": Quantization.model_validate({"deployment": "gguf-q4_0"}),
    "gguf-q4_1": Quantization.model_validate({"deployment": "gguf-q4_1"}),
    "gguf-q8_0": Quantization.model_validate({"deployment": "gguf-q8_0"}),
}


def trained_model(quantization: Quantization, source: str = "random:tiny") -> PreTrainedModel:
    """A model whose weights are no longer those that its scales were chosen from, as after training."""
    model = load_model(Model(source=source))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    prepare(model, quantization)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.weight.add_(torch.randn(layer.weight.shape, generator=generator) * 0.003)
            assert layer.weight_scale is not None
            layer.weight_scale.mul_(0.93)
    return model.eval()


def token_ids() -> Tensor:
    return torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))


def export(name: str, model: PreTrainedModel, folder: Path) -> Tensor:
    """Losses of the export in its own runtime."""
    writer = importlib.import_module(f"qatapult.trainer.export.{name}")
    writer.export(TrainedModel.in_memory(model), load_tokenizer(Model(source="random:tiny")), folder)
    return writer.reload(folder, torch.device("cpu"))(token_ids())


@pytest.mark.parametrize("source", ["random:tiny", "random:tiny-tied"])
@pytest.mark.parametrize("grid", ["w4a8", "w4a8-g64", "w8a8", "w4a16-g32", "w8a16"])
def test_compressed_tensors_in_stock_transformers_is_the_trained_model(
    grid: str, source: str, tmp_path: Path
) -> None:
    model = trained_model(GRIDS[grid], source)
    losses = export("compressed_tensors", model, tmp_path / "out")
    # The library multiplies fake-quantized values: another last bit than integer sums, and then another code.
    with arithmetic(quant_layers(model), "fake"):
        torch.testing.assert_close(losses, token_losses(model, token_ids()), atol=2e-3, rtol=0)
    packed = convert(model)
    assert isinstance(packed, PreTrainedModel)
    assert losses.mean().exp() == pytest.approx(
        token_losses(packed, token_ids()).mean().exp().item(), rel=0.01
    )
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == ("int-quantized" if grid == "w8a8" else "pack-quantized")


@pytest.mark.parametrize("grid", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0"])
def test_gguf_in_llama_cpp_gives_the_packed_models_perplexity(grid: str, tmp_path: Path) -> None:
    model = trained_model(GRIDS[grid])
    losses = export("gguf", model, tmp_path / "out")
    packed = convert(model)
    assert isinstance(packed, PreTrainedModel)
    expected = token_losses(packed, token_ids())
    assert losses.mean().exp() == pytest.approx(expected.mean().exp().item(), rel=0.01)
    # Token by token: a wrong order of rows or nibbles would leave the mean of a random model alone.
    assert torch.corrcoef(torch.stack([losses.flatten(), expected.flatten()]))[0, 1] > 0.995


@pytest.mark.parametrize("grid", ["w4a16-g32", "w8a16", "w4a16-asymmetric"])
def test_torchao_in_stock_transformers_is_the_trained_model(grid: str, tmp_path: Path) -> None:
    model = trained_model(GRIDS[grid])
    losses = export("torchao", model, tmp_path / "out")
    torch.testing.assert_close(losses, token_losses(model, token_ids()), atol=1e-4, rtol=0)
    assert any(value.dtype == torch.int8 for value in load_file(tmp_path / "out/model.safetensors").values())


def test_plain_safetensors_hold_the_values_of_the_grid(tmp_path: Path) -> None:
    model = trained_model(GRIDS["w4a16-g32"])
    losses = export("plain", model, tmp_path / "out")
    torch.testing.assert_close(losses, token_losses(model, token_ids()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "weights", "activations", "says"),
    [
        ("compressed_tensors", {"bits": 3}, A8, "4 or 8 bits"),
        (
            "compressed_tensors",
            {"bits": 4, "granularity": "group", "group_size": 16},
            None,
            "groups of 32, 64, 128",
        ),
        ("compressed_tensors", {"bits": 4, "symmetric": False}, None, "use a symmetric grid"),
        (
            "compressed_tensors",
            {"bits": 8, "granularity": "group", "group_size": 32},
            A8,
            "use granularity channel",
        ),
        ("gguf", {"bits": 4}, None, "gguf-q4_0"),
        (
            "gguf",
            {"bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "float16"},
            A8,
            "inputs of int8",
        ),
        ("torchao", {"bits": 4}, A8, "asymmetrically"),
        ("torchao", {"bits": 2}, None, "4 or 8 bits"),
    ],
)
def test_grids_that_a_format_cannot_run_are_refused_and_nothing_is_written(
    name: str, weights: dict[str, object], activations: TensorScheme | None, says: str, tmp_path: Path
) -> None:
    grid = Quantization(weights=TensorScheme.model_validate(weights), activations=activations)
    with pytest.raises(UserError, match=says):
        export(name, trained_model(grid), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_layer_is_read_when_it_is_written_and_no_earlier(tmp_path: Path) -> None:
    model = trained_model(GRIDS["w4a8"])
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = TrainedModel.stored(model.config, GRIDS["w4a8"], "lsq", tmp_path / "model.safetensors")
    read: list[str] = []
    open_tensor = stored._read
    stored._read = lambda name: (read.append(name), open_tensor(name))[1]
    seen = 0
    for name, layer in stored.layers():
        seen += len(layer.state_dict())
        assert len(read) == seen, f"{name}: tensors of later layers were read"
        assert all(parameter.device.type == "cpu" for parameter in layer.parameters())
        assert all(p.device.type == "meta" for p in stored.skeleton.get_submodule(name).parameters())
    assert sorted(read) == sorted(tensors)


def test_large_models_are_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    tensors = {
        f"layer.{i}.{dtype}": torch.arange(1 + 37 * i, dtype=torch.float32).to(getattr(torch, dtype))
        for i in range(6)
        for dtype in ("float32", "bfloat16", "int8", "int64", "float16")
    }
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert {path.name for path in tmp_path.iterdir()} == files | {"model.safetensors.index.json"}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_failed_export_leaves_the_earlier_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qatapult.trainer.export import compressed_tensors

    model = trained_model(GRIDS["w4a8"])
    export("compressed_tensors", model, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed_tensors, "write_config", full_disk)
    with pytest.raises(OSError, match="No space"):
        export("compressed_tensors", model, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recipe_that_names_its_deployment_gets_its_grid(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nmodel: {source: random:tiny}\nquantization: {deployment: gguf-q4_0}\n")
    recipe = load_recipe(path)
    weights = recipe.quantization.weights
    assert weights is not None
    assert (weights.bits, weights.group_size, weights.scale_dtype) == (4, 32, "float16")
    assert recipe.quantization.activations is None
    assert recipe.export == ("gguf",)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("{deployment: gguf-q4_0, weights: {bits: 4}}", "leave weights out"),
        ("{deployment: gguf-q2_k}", "'gguf-q4_0', 'gguf-q8_0', 'gguf-q4_1'"),
        ("{deployment: gguf-q8_0, activations: {bits: 8, granularity: token}}", "set activations to null"),
        ("{deployment: compressed-tensors, weights: {bits: 3}}", "4 or 8 bits"),
        (
            "{deployment: torchao, weights: {bits: 4}, activations: {bits: 8, granularity: token}}",
            "another grid",
        ),
    ],
)
def test_a_grid_that_the_deployment_cannot_store_is_refused_with_the_recipe(
    quantization: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: x\nmodel: {{source: random:tiny}}\nquantization: {quantization}\n")
    with pytest.raises(UserError, match=says):
        load_recipe(path)
