"""`prepare` and `convert` on small modules: names, ties, overrides, and equal codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qatapult.trainer.models import empty_model, load_model
from qatapult.trainer.quantize.clipping import calibrate_clips
from qatapult.trainer.quantize.convert import PackedLinear, convert, packed_layers
from qatapult.trainer.quantize.modules import QuantConv2d, QuantEmbedding, QuantLinear
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model, Quantization


def tiny(source: str = "random:tiny") -> nn.Module:
    return load_model(Model(source=source))


def test_parameters_keep_their_names_and_values() -> None:
    model = tiny()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare(model, Quantization())
    after = dict(model.named_parameters())
    assert set(before) < set(after)
    assert all(name.endswith(".weight_scale") for name in set(after) - set(before))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_embeddings_stay_tied() -> None:
    model = tiny("random:tiny-tied")
    prepare(model, Quantization(embeddings={"bits": 8}, skip=()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.embed_tokens, QuantEmbedding)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("activations", [None, {"bits": 8, "granularity": "token"}])
def test_packed_model_equals_the_trained_one(
    bits: int, symmetric: bool, group: int | None, activations: dict[str, object] | None
) -> None:
    weights = {
        "bits": bits,
        "symmetric": symmetric,
        "granularity": "group" if group else "channel",
        "group_size": group,
    }
    model = tiny()
    prepare(model, Quantization(weights=weights, activations=activations))
    codes = {name: layer.codes() for name, layer in quant_layers(model).items()}
    packed = convert(model)
    assert codes.keys() == packed_layers(packed).keys()
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, actual = model(ids).logits, packed(ids).logits
    noise = (expected - actual).norm() / expected.norm()
    assert 20 * torch.log10(noise) < -35


def test_overrides_keep_layers_at_eight_bits_or_in_full_precision() -> None:
    model = tiny()
    overrides = [
        {"match": "*.down_proj", "weights": {"bits": 8}},
        {"match": "model.layers.0.self_attn.*", "activations": None},
    ]
    prepare(model, Quantization(overrides=overrides))
    assert model.model.layers[1].mlp.down_proj.weight_scheme.bits == 8
    first = model.model.layers[0].self_attn.q_proj
    assert type(first) is nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantLinear)


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="matches no layer"):
        prepare(tiny(), Quantization(overrides=[{"match": "model.layer.*", "weights": {"bits": 8}}]))


def test_a_group_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(UserError, match=r"q_proj.*does not divide 64 features; 32 or 64"):
        prepare(tiny(), Quantization(weights={"bits": 4, "granularity": "group", "group_size": 48}))


@pytest.mark.parametrize("method", ["lsq", "minmax", "lsq+", "pact"])
def test_every_method_trains_weights_and_what_it_learns(method: str) -> None:
    model = tiny()
    weights = {"bits": 4, "symmetric": method != "lsq+"}
    prepare(model, Quantization(weights=weights), method=method)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    calibrate_clips(model, ids)
    model(ids).logits.square().sum().backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.grad.abs().sum() > 0
    learned = {"lsq": ["weight_scale"], "minmax": [], "lsq+": ["weight_scale", "weight_zero_point"]}
    for name in learned.get(method, ["weight_scale", "activation_clip"]):
        assert getattr(layer, name).grad is not None
    if method == "minmax":
        assert not any(name.endswith("weight_scale") for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", ["lsq", "lsq+", "minmax", "pact"])
def test_what_a_method_adds_is_where_the_weights_are(method: str) -> None:
    model = empty_model(Model(source="random:tiny"))
    prepare(model, Quantization(weights={"bits": 4, "symmetric": method != "lsq+"}), method=method)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_a_convolution_and_an_embedding_take_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    reference = copy.deepcopy(model)
    prepare(model, Quantization(weights={"bits": 8}, activations={"bits": 8, "granularity": "token"}))
    assert isinstance(model[0], QuantConv2d)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), reference(images), rtol=0.05, atol=0.05)


def test_packing_makes_a_layer_an_eighth_of_its_size() -> None:
    layer = nn.Sequential(nn.Linear(256, 128, bias=False))
    prepare(layer, Quantization())
    packed = convert(layer)[0]
    assert isinstance(packed, PackedLinear)
    assert packed.nbytes == 128 * 256 // 2 + 128 * 4
    assert packed.kind == "int4 × int8"
