"""What the analyses of a model's inside find where the answer is known."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from qatapult.kernels import Scheme, choose_range, dequantize, quantize
from qatapult.trainer.evaluate.perplexity import Perplexity, perplexity
from qatapult.trainer.insight import activations, importance, scales, weights
from qatapult.trainer.insight.sentences import claims
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.schema import Model, Quantization, TensorScheme
from qatapult.trainer.report import plots

SCHEMES = [
    Scheme(bits=4, granularity="channel"),
    Scheme(bits=4, granularity="group", group_size=16),
    Scheme(bits=4, granularity="channel", symmetric=False),
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=2, granularity="channel", grid="stretched"),
    Scheme(bits=1.58, granularity="channel", range_method="absmean"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_weights_on_the_grid_are_all_near(scheme: Scheme) -> None:
    weight = torch.randn(32, 64)
    scale, zero_point = choose_range(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    fit = weights.grid_fit(dequantize(codes, scale, zero_point, scheme), scale, zero_point, scheme)
    assert fit.near == 1.0
    assert fit.distance == pytest.approx(0, abs=1e-4)
    assert fit.error == pytest.approx(0, abs=1e-5)
    assert fit.clipped == 0.0


def test_weights_that_know_no_grid_are_uniform_between_points() -> None:
    fit = weights.nearest_fit(
        torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)), Scheme(bits=8)
    )
    assert fit.near == pytest.approx(2 * weights.NEAR, abs=0.01)
    assert fit.distance == pytest.approx(0.25, abs=0.01)
    assert max(fit.fractions) < 1.2 * min(fit.fractions)
    assert fit.kurtosis == pytest.approx(0, abs=0.1)
    assert fit.tail == pytest.approx(0.0027, abs=5e-4)


def test_clipping_counts_what_lies_beyond_the_grid() -> None:
    weight = torch.linspace(-1, 1, 1001)[None]
    fit = weights.grid_fit(weight, torch.tensor([[0.05]]), None, Scheme(bits=4))
    outside = (weight < -8.5 * 0.05) | (weight > 7.5 * 0.05)
    assert fit.clipped == pytest.approx(float(outside.float().mean()), abs=2e-3)
    assert sum(fit.fractions) == pytest.approx(1001 - int(outside.sum()), abs=2)


def test_levels_and_entropy() -> None:
    weight = torch.tensor([[-8.0, 7.0, 7.0, -8.0], [0.0, 1.0, 2.0, 3.0]])
    fit = weights.grid_fit(weight, torch.ones(2, 1), None, Scheme(bits=4))
    assert fit.levels_used == 3.0  # two in the first row, four in the second
    assert fit.entropy_bits == pytest.approx(2 * 0.25 * 2 + 4 * 0.125 * 3)


@given(st.lists(st.integers(-8, 7), min_size=3, max_size=8))
@settings(max_examples=50)
def test_oscillation_is_a_turn_of_direction(path: list[int]) -> None:
    moves = [b - a for a, b in itertools.pairwise(path) if a != b]
    turned = any(a * b < 0 for a, b in itertools.pairwise(moves))
    snapshots = [torch.tensor([[code]], dtype=torch.int8) for code in path]
    assert weights.oscillating(snapshots) == float(turned)


def test_two_snapshots_cannot_oscillate() -> None:
    assert weights.oscillating([torch.zeros(2, 2), torch.ones(2, 2)]) == 0.0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return load_model(Model(source="random:tiny"))


@pytest.fixture
def quantized(model: PreTrainedModel) -> PreTrainedModel:
    fresh = load_model(Model(source="random:tiny"))
    fresh.load_state_dict(model.state_dict())
    prepare(fresh, Quantization(weights=TensorScheme(bits=3)))
    return fresh.eval()


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(0, 256, (3, 48), generator=torch.Generator().manual_seed(1))


def test_outlier_channels_are_found(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    name = "model.layers.0.mlp.gate_proj"
    scheme = Scheme(bits=8, granularity="token")
    norm = model.get_submodule("model.layers.0.post_attention_layernorm")
    before = activations.layer_activations(model, blocks, {name: scheme})[name]
    with torch.no_grad():
        norm.weight[17] *= 100
    try:
        after = activations.layer_activations(model, blocks, {name: scheme}, {name: before.static_range})[
            name
        ]
    finally:
        with torch.no_grad():
            norm.weight[17] /= 100
    assert after.worst_channel == 17
    assert after.worst_ratio > 20 * before.worst_ratio
    assert after.outlier_channels >= 1 / 64 > before.outlier_channels - 1e-9
    assert after.crest > before.crest
    assert after.beyond_static > before.beyond_static == activations.STATIC_OUTSIDE
    assert after.sqnr_db < before.sqnr_db - 6
    assert after.clipped == 0.0  # a range of each token's own clips nothing


def test_attention_shares_are_shares(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    implementation = model.config._attn_implementation
    sinks = activations.attention_sinks(model, blocks)
    assert len(sinks) == model.config.num_hidden_layers
    assert all(0 < share < 1 for share in sinks)
    assert model.config._attn_implementation == implementation


def test_massive_activations_are_named(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    assert activations.massive_activations(model, blocks) == []
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    saved = down.weight.detach().clone()
    with torch.no_grad():
        down.weight[5] *= 1e6
    try:
        found = activations.massive_activations(model, blocks)
    finally:
        with torch.no_grad():
            down.weight.copy_(saved)
    assert [entry["channel"] for entry in found] == [5]
    assert found[0]["layers"] == [0, 0]
    assert 0 <= found[0]["at_first_token"] <= 1


def test_importance_is_the_change_of_the_loss(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    """Taylor importance against finite differences of a mask on single neurons."""
    name = importance.last_projections(model)[0]
    block = blocks[:1]
    taylor, fisher = importance.neuron_importance(model, block, [name])
    layer = model.get_submodule(name)

    def loss_with(neuron: int, factor: float) -> float:
        mask = torch.ones(layer.in_features)
        mask[neuron] = factor
        handle = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask,))
        try:
            with torch.no_grad():
                return float(importance._loss(model, block).double())
        finally:
            handle.remove()

    for neuron in (0, 7, int(taylor[name].argmax())):
        slope = (loss_with(neuron, 1.05) - loss_with(neuron, 0.95)) / 0.1
        assert float(taylor[name][neuron]) == pytest.approx(abs(slope), rel=0.05, abs=2e-4)
    assert torch.allclose(fisher[name], taylor[name].square())  # one block: nothing to average
    assert all(parameter.grad is None for parameter in model.parameters())


def test_importance_of_a_quantized_model(quantized: PreTrainedModel, blocks: torch.Tensor) -> None:
    names = importance.last_projections(quantized)
    taylor, _ = importance.neuron_importance(quantized, blocks, names)
    assert all(float(values.sum()) > 0 for values in taylor.values())
    assert all(parameter.requires_grad for parameter in quantized.parameters())


def test_concentration() -> None:
    even, one = torch.ones(100), torch.zeros(100)
    one[3] = 1
    assert importance.gini(even) == pytest.approx(0, abs=1e-9)
    assert importance.gini(one) == pytest.approx(0.99)
    assert importance.top_share(even) == pytest.approx(0.1)
    assert importance.top_share(one) == 1.0


def test_pruning_switches_off_the_least_important(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    names = importance.last_projections(model)
    taylor, _ = importance.neuron_importance(model, blocks, names)
    upside_down = {name: -values for name, values in taylor.items()}
    shares = (0.0, 0.3)
    gentle = importance.pruned_perplexities(model, blocks, taylor, shares)
    harsh = importance.pruned_perplexities(model, blocks, upside_down, shares)
    assert gentle[0] == harsh[0]
    assert abs(math.log(gentle[1] / gentle[0])) < abs(math.log(harsh[1] / harsh[0]))


def test_tolerated_share_is_interpolated() -> None:
    assert importance.tolerated_share((0.0, 0.1, 0.2), (10.0, 10.2, 11.2), 0.05) == pytest.approx(0.13)
    assert importance.tolerated_share((0.0, 0.1), (10.0, 10.1), 0.05) == 0.1


def test_scale_moves() -> None:
    move = scales.scale_moves(torch.ones(4, 1), torch.tensor([[2.0], [2.0], [1.0], [1.01]]))
    assert move["mean"] == pytest.approx((1 + 1 + 0 + math.log2(1.01)) / 4, abs=1e-6)
    assert move["moved"] == 0.5


def test_ablation_switches_groups_off_and_on_again(quantized: PreTrainedModel, blocks: torch.Tensor) -> None:
    layers = quant_layers(quantized)
    found = scales.ablation(quantized, layers, blocks)
    assert {group["name"] for group in found["groups"]} >= {"block 0", "block 1", "down_proj", "q_proj"}
    costs = [group["cost"] for group in found["groups"]]
    assert costs == sorted(costs, reverse=True)
    first = found["groups"][0]
    assert first["cost"] == pytest.approx(math.log(found["perplexity"] / first["perplexity"]))
    assert all(layer.quantize_weights and layer.quantize_activations for layer in layers.values())


def test_ablation_from_the_first_block_that_changes_is_the_whole_model_s(
    quantized: PreTrainedModel, blocks: torch.Tensor
) -> None:
    """Starting at kept hidden states gives what running everything gives."""
    layers = quant_layers(quantized)
    found = {
        group["name"]: group["perplexity"] for group in scales.ablation(quantized, layers, blocks)["groups"]
    }
    for name, members in scales.layer_groups(layers).items():
        with scales.switched_off([layers[member] for member in members]):
            whole = perplexity(quantized, blocks, torch.zeros_like(blocks)).value
        assert found[name] == pytest.approx(whole, rel=1e-5), name


def test_deep_models_are_sampled_evenly() -> None:
    groups = scales.layer_groups(
        [f"model.layers.{i}.mlp.{part}" for i in range(80) for part in ("up", "down")]
    )
    tried = scales.sampled_groups(groups, 5)
    assert list(tried) == ["block 0", "up", "down", "block 20", "block 40", "block 59", "block 79"]
    assert scales.sampled_groups(groups, 80) == groups


def test_pruning_ends_where_the_model_is_ruined(model: PreTrainedModel, blocks: torch.Tensor) -> None:
    shares = (0.0, 0.5, 0.9)
    ruin = iter((10.0, 31.0, 99.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "perplexity", lambda *_: Perplexity([(math.log(next(ruin)), 1)]))
        found = importance.pruned_perplexities(model, blocks, {}, shares)
    assert found == pytest.approx([10, 31])
    assert importance.tolerated_share(shares, found, 0.05) == pytest.approx(0.5 * 0.5 / 21)
    assert importance.tolerated_share(shares, found, 9.0) == 0.5


def test_a_curve_that_ended_early_is_drawn() -> None:
    axes = Figure().subplots()
    curve = {"perplexities": [10.0, 31.0]}
    part = {"shares": [0.0, 0.1, 0.2], "full_precision": curve, "ptq": curve, "qat": curve}
    assert plots._pruning(axes, {"insight": {"importance": part}}, {})
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 2, 2]  # type: ignore[arg-type]


def test_verdicts_follow_the_figures() -> None:
    part = {"near": 0.2, "tail": 0.01, "kurtosis": 1.0, "clipped": 0.023}
    after = {"near": 0.3, "tail": 0.02, "kurtosis": 1.0, "clipped": 0.004}
    result = {"weights": {"full_precision": part, "ptq": part, "qat": after}}
    verdicts = {claim["claim"]: claim["verdict"] for claim in claims(result)}
    assert verdicts == {
        "weights cluster at grid points": "confirmed",
        "tails of the weights shrink": "contradicted",
        "kurtosis of the weights falls": "no change",
        "fewer weights are clipped": "confirmed",
    }


def test_what_ptq_did_is_not_credited_to_training() -> None:
    full = {"near": 0.2, "tail": 0.006, "kurtosis": 1.6, "clipped": 0.0}
    started = {"near": 0.2, "tail": 0.004, "kurtosis": 1.3, "clipped": 0.0}
    trained = {"near": 0.2, "tail": 0.004, "kurtosis": 1.0, "clipped": 0.004}
    found = {
        claim["claim"]: claim["verdict"]
        for claim in claims({"weights": {"full_precision": full, "ptq": started, "qat": trained}})
    }
    assert found["tails of the weights shrink"] == "by PTQ, not by training"
    assert found["kurtosis of the weights falls"] == "confirmed"
    assert found["fewer weights are clipped"] == "contradicted"


def qatapult(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qatapult.trainer.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_command_on_a_run(tmp_path: Path) -> None:
    """Train a random model for a few steps, look inside, and find it in the report."""
    changes = ["name=tiny", "export=[]", "qat.tokens=8192"]
    done = qatapult("train", "tiny-random-w4a8", *changes, "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = qatapult("insight", str(tmp_path / "tiny"), "--blocks", "2", "--only", "weights")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "tiny" / "insight.json").read_text())
    assert set(first["sentences"]) == {"weights"}
    done = qatapult("insight", str(tmp_path / "tiny"), "--blocks", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert "weights: as measured before" in done.stderr
    assert "activations: as measured before" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "tiny" / "insight.json").read_text())
    assert set(found["sentences"]) == {"weights", "activations", "importance", "scales"}
    assert found["weights"]["snapshots"] >= 3  # start, checkpoints, end
    assert found["weights"] == first["weights"]
    assert found["cost"]["seconds"] > first["cost"]["seconds"]
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert report["insight"]["weights"]["qat"]["near"] == found["weights"]["qat"]["near"]
    assert all(layer["error_after"] > 0 for layer in report["layers"])
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert found["sentences"]["weights"][:40] in page
    refused = qatapult("insight", str(tmp_path / "tiny"), "--only", "vibes")
    assert refused.returncode == 2
    assert "'vibes' is not one of weights, activations, importance, scales" in refused.stderr
