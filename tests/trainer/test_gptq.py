"""GPTQ: codes on the grid, layer errors below round-to-nearest's, inputs of the quantized model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatapult.kernels import Scheme, choose_range, dequantize, quantize
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.modules import QuantLinear
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks, hessian_of, spread_blocks, walk_blocks
from qatapult.trainer.quantize.ptq.gptq import Factor, best_ranges, compensate, gptq_weight
from qatapult.trainer.quantize.ptq.gptq import quantize as gptq
from qatapult.trainer.recipe import schema
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe

SCHEMES = [
    Scheme(bits=4),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=3, granularity="group", group_size=16),
    Scheme(bits=2, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=2, grid="stretched"),
    Scheme(bits=1.58, range_method="absmean"),
    Scheme(bits=1, grid="stretched", range_method="absmean"),
]


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs with the strong correlations between features that real activations have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    spread = torch.logspace(0, -1.5, features)
    return torch.randn(tokens, features, generator=generator) * spread @ mixing


def output_error(inputs: torch.Tensor, weight: torch.Tensor, approximation: torch.Tensor) -> float:
    return float((inputs @ (weight - approximation).t()).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_codes_of_each_column_are_the_grid_codes_of_its_compensated_weight(scheme: Scheme) -> None:
    """The loop rounds without the kernels' functions: here its errors are followed with them."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    scale, zero_point = choose_range(weight, scheme)
    factor = Factor(hessian_of(correlated(256, 64)), 0.01, act_order=False)
    _, codes, _ = gptq_weight(weight, factor, scheme, scale, zero_point)
    rest = weight.clone()
    for i in range(64):
        expected = quantize(rest, scale, zero_point, scheme)[:, i]
        assert (codes[:, i] == expected).float().mean() > 0.98  # sums in another order may cross a border
        value = dequantize(codes, scale, zero_point, scheme)[:, i]
        error = (rest[:, i] - value) / factor.inverse_root[i, i]
        rest[:, i + 1 :] -= torch.outer(error, factor.inverse_root[i, i + 1 :])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_error_of_outputs_is_below_round_to_nearest(scheme: Scheme, act_order: bool) -> None:
    inputs, weight = correlated(512, 192), torch.randn(48, 192, generator=torch.Generator().manual_seed(1))
    scale, zero_point = choose_range(weight, scheme)
    nearest = dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    _, codes, _ = gptq_weight(weight, Factor(hessian_of(inputs), 0.01, act_order), scheme, scale, zero_point)
    chosen = dequantize(codes, scale, zero_point, scheme)
    assert output_error(inputs, weight, chosen) < 0.8 * output_error(inputs, weight, nearest)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 10),
    index=st.integers(0, len(SCHEMES) - 1),
    magnitude=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_kept_weight_rounds_onto_the_codes(
    rows: int, groups: int, index: int, magnitude: float, seed: int
) -> None:
    scheme = SCHEMES[index]
    features = groups * 32
    weight = magnitude * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = choose_range(weight, scheme)
    factor = Factor(hessian_of(correlated(64, features, seed)), 0.01, act_order=True)
    kept, codes, _ = gptq_weight(weight, factor, scheme, scale, zero_point)
    assert torch.equal(quantize(kept, scale, zero_point, scheme), codes)
    assert codes.min() >= scheme.qmin
    assert codes.max() <= scheme.qmax


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_reported_error_is_that_of_the_outputs(scheme: Scheme) -> None:
    inputs, weight = correlated(256, 64), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(inputs)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    scale, zero_point = choose_range(weight, scheme)
    _, codes, error = gptq_weight(weight, Factor(hessian, 0.01, True), scheme, scale, zero_point)
    change = weight - dequantize(codes, scale, zero_point, scheme)
    torch.testing.assert_close(error, (change @ damped * change).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_searched_ranges_lower_the_error_of_every_row(scheme: Scheme) -> None:
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    factor = Factor(hessian_of(correlated(512, 192)), 0.01, True)
    scale, zero_point = choose_range(weight, scheme)
    plain = gptq_weight(weight, factor, scheme, scale, zero_point).error
    better = best_ranges(weight, factor, scheme, scale, zero_point)
    found = gptq_weight(weight, factor, scheme, better, zero_point).error
    assert better.shape == scale.shape
    if scheme.granularity == "tensor":
        assert found.sum() <= plain.sum() * 1.001
    else:
        assert (found <= plain * 1.001).all()


def test_is_the_published_recursion() -> None:
    """Against the paper's unblocked form, which inverts and updates the Hessian column by column."""
    scheme, weight = Scheme(bits=4), torch.randn(6, 40, dtype=torch.float64)
    hessian = hessian_of(correlated(256, 40)).double()
    scale, _ = choose_range(weight, scheme)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    inverse, rest = torch.linalg.inv(damped), weight.clone()
    expected = torch.empty(6, 40, dtype=torch.int8)
    for i in range(40):
        expected[:, i] = quantize(rest[:, i : i + 1].float(), scale, None, scheme)[:, 0]
        error = (rest[:, i] - expected[:, i] * scale[:, 0]) / inverse[i, i]
        rest -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    _, codes, _ = gptq_weight(weight, Factor(hessian.float(), 0.01, act_order=False), scheme, scale, None)
    assert (codes == expected).float().mean() > 0.99


def test_uncorrelated_inputs_leave_round_to_nearest() -> None:
    scheme, weight = Scheme(bits=4, granularity="group", group_size=32), torch.randn(8, 64)
    scale, zero_point = choose_range(weight, scheme)
    _, codes, _ = gptq_weight(weight, Factor(torch.eye(64), 0.01, act_order=True), scheme, scale, zero_point)
    assert torch.equal(codes, quantize(weight, scale, zero_point, scheme))


def test_a_feature_that_is_always_zero_is_rounded_to_nearest() -> None:
    inputs = correlated(256, 64)
    inputs[:, 5] = 0
    scheme, weight = Scheme(bits=4), torch.randn(8, 64)
    scale, _ = choose_range(weight, scheme)
    _, codes, _ = gptq_weight(weight, Factor(hessian_of(inputs), 0.01, act_order=True), scheme, scale, None)
    assert torch.equal(codes[:, 5], quantize(weight, scale, None, scheme)[:, 5])


def test_duplicate_features_need_only_the_damping() -> None:
    inputs = correlated(256, 32)
    hessian = hessian_of(torch.cat([inputs, inputs], dim=1))
    assert torch.isfinite(Factor(hessian, 0.01, act_order=True).inverse_root).all()


def test_nan_in_the_activations_is_refused() -> None:
    inputs = correlated(64, 32)
    inputs[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Factor(hessian_of(inputs), 0.01, act_order=True)


def test_hessian_is_the_mean_outer_product() -> None:
    inputs = torch.randn(3, 17, 50)
    expected = inputs.reshape(-1, 50).t() @ inputs.reshape(-1, 50) / 51
    torch.testing.assert_close(hessian_of(inputs), expected)


def tiny() -> tuple[torch.nn.Module, torch.Tensor]:
    model = load_model(schema.Model(source="random:tiny"))
    return model, torch.randint(
        0, model.config.vocab_size, (6, 32), generator=torch.Generator().manual_seed(3)
    )


def test_walk_shows_each_linear_what_the_model_shows_it() -> None:
    model, calibration = tiny()
    seen: dict[str, torch.Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    walk_blocks(model, calibration, lambda layer, inputs: seen.__setitem__(names[layer], inputs))
    expected: dict[str, torch.Tensor] = {}
    for block in decoder_blocks(model):
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(lambda m, args: expected.__setitem__(names[m], args[0]))
    with torch.no_grad():
        model(input_ids=calibration, use_cache=False)
    assert seen.keys() == expected.keys()
    for name in seen:
        torch.testing.assert_close(seen[name], expected[name])


@pytest.mark.parametrize("group_size", [None, 32])
def test_a_model_is_closer_to_full_precision_than_round_to_nearest(group_size: int | None) -> None:
    model, calibration = tiny()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are too small for a block to matter
            if parameter.ndim == 2:
                parameter.mul_(4)
        reference = model(input_ids=calibration).logits
    granularity = "group" if group_size else "channel"
    quantization = schema.Quantization(
        weights=schema.TensorScheme(bits=3, granularity=granularity, group_size=group_size),
        activations=schema.TensorScheme(bits=8, granularity="token"),
    )
    prepare(model, quantization)
    before = {name: layer.grid()[0].clone() for name, layer in quant_layers(model).items()}
    with torch.no_grad():
        nearest = (model(input_ids=calibration).logits - reference).square().mean()
        gptq(model, calibration, schema.Ptq(), quantization)
        error = (model(input_ids=calibration).logits - reference).square().mean()
    assert error < 0.9 * nearest
    for name, layer in quant_layers(model).items():
        shrunk = layer.grid()[0] / before[name]
        assert shrunk.max() <= 1
        assert shrunk.min() > 0.59


def test_recomputed_scales_are_refused() -> None:
    model, calibration = tiny()
    quantization = schema.Quantization()
    prepare(model, quantization, method="minmax")
    with pytest.raises(UserError, match="recomputes"):
        gptq(model, calibration, schema.Ptq(), quantization)


def test_training_mode_and_hooks_are_as_before() -> None:
    model, calibration = tiny()
    quantization = schema.Quantization(weights=schema.TensorScheme(bits=4))
    prepare(model, quantization).train()
    gptq(model, calibration, schema.Ptq(), quantization)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_scale_dtype_of_the_deployment_is_kept() -> None:
    scheme, weight = Scheme(bits=4, scale_dtype="float16"), torch.randn(8, 64)
    scale, _ = choose_range(weight, scheme)
    kept, codes, _ = gptq_weight(
        weight, Factor(hessian_of(correlated(128, 64)), 0.01, True), scheme, scale, None
    )
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(quantize(kept, scale, None, scheme), codes)


def test_calibration_blocks_are_spread_over_the_text() -> None:
    train = torch.arange(100).view(100, 1)
    assert spread_blocks(train, 4).flatten().tolist() == [0, 33, 66, 99]
    assert torch.equal(spread_blocks(train, 200), train)


@pytest.mark.slow
def test_every_layer_of_a_trained_model_has_less_error_than_round_to_nearest() -> None:
    pytest.importorskip("gguf")
    recipe = load_recipe("smollm2-135m-w4a8", ["data.block_size=256"])
    model = load_model(recipe.model)
    calibration = spread_blocks(load_data(recipe, load_tokenizer(recipe.model)).train, 4)
    prepare(model, recipe.quantization)
    names = {layer: name for name, layer in quant_layers(model).items()}
    worse: list[str] = []

    def on_input(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
        assert isinstance(layer, QuantLinear)
        seen, weight = layer.fake_quantized_input(inputs).flatten(0, -2), layer.weight.detach().clone()
        nearest = output_error(seen, weight, layer.fake_quantized_weight().detach())
        compensate(layer, Factor(hessian_of(seen), 0.01, act_order=True))
        if output_error(seen, weight, layer.fake_quantized_weight().detach()) >= nearest:
            worse.append(names[layer])

    walk_blocks(model, calibration, on_input)
    assert len(names) == 210
    assert not worse
