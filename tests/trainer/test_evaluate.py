"""Evaluation: perplexities, tasks, the guard, parity, and the commands on the models of a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import PreTrainedModel
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.evaluate.kernels import counting
from qatapult.trainer.evaluate.parity import compare, shortfall
from qatapult.trainer.evaluate.perplexity import perplexity, token_losses
from qatapult.trainer.evaluate.sliding import sliding_perplexity
from qatapult.trainer.evaluate.tasks import find_tasks
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize.convert import convert, packed_layers
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model, Override, Quantization, TensorScheme

RECIPE = "tiny-random-w4a8"


def prepared(**quantization: object) -> PreTrainedModel:
    model = load_model(Model(source="random:tiny"))
    prepare(model, Quantization.model_validate(quantization))
    return model.eval()


def packed(model: PreTrainedModel) -> PreTrainedModel:
    converted = convert(model)
    assert isinstance(converted, PreTrainedModel)
    return converted


def ids(blocks: int, length: int) -> torch.Tensor:
    return torch.randint(256, (blocks, length), generator=torch.Generator().manual_seed(0))


def test_one_window_over_everything_is_the_plain_perplexity() -> None:
    model = load_model(Model(source="random:tiny"))
    stream = ids(1, 40)[0]
    plain = math.exp(token_losses(model, stream[None]).mean().item())
    assert sliding_perplexity(model, stream, 64, 32) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (16, 8), (7, 6), (5, 1)])
def test_a_sliding_window_judges_every_token_once_with_the_context_it_promises(
    window: int, stride: int
) -> None:
    model = load_model(Model(source="random:tiny"))
    stream = ids(1, 37)[0]
    total = 0.0
    for target in range(1, len(stream)):
        # The first window that holds the token; its context begins where that window does.
        first = max(0, math.ceil((target + 1 - window) / stride) * stride)
        logits = model(stream[None, first:target]).logits[0, -1].log_softmax(-1)
        total -= float(logits[stream[target]])
    expected = math.exp(total / (len(stream) - 1))
    assert sliding_perplexity(model, stream, window, stride) == pytest.approx(expected, rel=1e-4)


def test_losses_are_kept_for_each_document() -> None:
    model = load_model(Model(source="random:tiny"))
    blocks = ids(2, 12)
    owners = torch.tensor([[0] * 5 + [1] * 7, [1] * 3 + [2] * 9])
    measured = perplexity(model, blocks, owners)
    assert [tokens for _, tokens in measured.losses] == [4, 9, 9]
    losses = token_losses(model, blocks)
    assert measured.losses[1][0] == pytest.approx(float(losses[0, 4:].sum() + losses[1, :2].sum()), rel=1e-5)


def test_the_guard_counts_what_ran() -> None:
    model = packed(
        prepared(overrides=[Override(match="*.down_proj", weights=TensorScheme(bits=8), activations=None)])
    )
    with counting(model) as kernels:
        model(ids(1, 8))
        model(ids(1, 8))
    assert kernels["by_kind"] == {"int4 × int8": 12, "int8 × float": 2}
    assert (kernels["linears"], kernels["integer"]) == (14, 12)
    assert kernels["products"] == {"integer": 24, "float": 4}


def test_the_guard_notices_a_layer_that_only_pretends() -> None:
    model = packed(prepared())
    layer = packed_layers(model)["model.layers.0.mlp.up_proj"]
    weight = torch.zeros(layer.out_features, layer.in_features)

    def simulated(x: torch.Tensor) -> torch.Tensor:
        layer.calls += 1
        return x @ weight.T

    layer.forward = simulated  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not the model that would be served"), counting(model):
        model(ids(1, 8))


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ({"bits": 4}, {"bits": 8, "granularity": "token"}),
        ({"bits": 8}, {"bits": 8, "granularity": "token"}),
        ({"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}, None),
        ({"bits": 3, "granularity": "group", "group_size": 32}, {"bits": 8, "granularity": "token"}),
        ({"bits": 2, "grid": "stretched"}, {"bits": 8, "granularity": "token"}),
        ({"bits": 1.58, "range": "absmean"}, None),
    ],
)
def test_packed_and_trained_model_agree(
    weights: dict[str, object], activations: dict[str, object] | None
) -> None:
    model = prepared(weights=weights, activations=activations)
    parity = compare(model, packed(model), ids(4, 64))
    assert parity["codes_equal"]
    assert parity["sqnr_db"] >= 40
    assert parity["top1_agreement"] >= 0.995
    assert all(layer["sqnr_db"] > 80 for layer in parity["layers"])
    # Where inputs are quantized, what the other arithmetic gives is told as well, and is the same model.
    assert ("fake_arithmetic" in parity) == (activations is not None)
    assert parity.get("fake_arithmetic", parity)["sqnr_db"] >= 20


def test_parity_names_the_layer_that_is_wrong() -> None:
    model = prepared()
    integers = packed(model)
    name = "model.layers.1.self_attn.o_proj"
    packed_layers(integers)[name].weight_scale.mul_(1.2)
    parity = compare(model, integers, ids(2, 32))
    short = shortfall(parity)
    assert short is not None
    assert name in short
    quant_layers(model)[name].weight.data.add_(0.05)
    assert "codes differ in 1 layers" in str(shortfall(compare(model, integers, ids(2, 32))))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "qatapult.trainer.cli", "train", RECIPE, "--runs", str(runs), "--quiet"]
    command += ["qat.tokens=640", "quantization.kv_cache={bits: 8, granularity: token}"]
    command += ["evaluation.tasks=[cpython_cloze]", "evaluation.limit=4", "evaluation.generate=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    return runs / RECIPE


def qatapult(*arguments: str) -> Result:
    """A command in this process: importing torch anew for each would take most of the time."""
    return CliRunner().invoke(app, arguments)


def test_a_run_measures_its_tasks_in_every_stage_and_verifies_its_export(run: Path) -> None:
    stages = {
        name: json.loads((run / f"stages/{name}.json").read_text()) for name in ("baseline", "qat", "packed")
    }
    for stage in stages.values():
        score = stage["tasks"]["cpython_cloze"]
        assert 0 <= score["value"] <= 1
        assert len(score["documents"]) == 4
        assert len(stage["samples"]) == 3
    assert stages["packed"]["kernels"]["integer"] == 14
    export = json.loads((run / "stages/export.json").read_text())["formats"]["compressed-tensors"]
    assert abs(export["difference"]) < 0.01
    card = (run / "export/compressed-tensors/README.md").read_text()
    assert f"{export['bytes']:,} bytes" in card
    assert "codes equal bit for bit" in card


def test_evaluate_gives_the_stages_own_figures(run: Path) -> None:
    done = qatapult("evaluate", str(run), "--model", "packed", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["perplexity"] == json.loads((run / "stages/packed.json").read_text())["perplexity"]
    assert result["kernels"]["by_kind"] == {"int4 × int8": 14}


def test_a_run_is_exported_again_on_demand(run: Path, tmp_path: Path) -> None:
    done = qatapult(
        "export", str(run), "--format", "safetensors", "--output", str(tmp_path / "out"), "--json"
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/model.safetensors").is_file()
    refused = qatapult("export", str(run), "--format", "gguf", "--output", str(tmp_path / "gguf"))
    assert isinstance(refused.exception, UserError)
    assert "gguf-q4_0" in str(refused.exception)
    assert not (tmp_path / "gguf").exists()


def test_generate_streams_the_packed_model(run: Path) -> None:
    done = qatapult("generate", str(run), "The with statement", "--tokens", "6", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["tokens"] <= 6
    assert result["kernels"]["by_kind"] == {"int4 × int8": 14}
    # Two layers, keys and values of two heads: 16 codes of one byte and an fp32 scale each.
    cached = result["prompt_tokens"] + result["tokens"] - 1
    assert result["cache_bytes"] == cached * 2 * 2 * 2 * (16 + 4)
    streamed = qatapult("generate", str(run), "The with statement", "--tokens", "6")
    assert streamed.stdout.rstrip("\n") == result["text"].rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "RUN", "--tasks", "cpython_clze"], "did you mean 'cpython_cloze'"),
        (["evaluate", "RUN", "--model", "packd"], "packed"),
        (["evaluate", "RUN", "--window", "8", "--stride", "8"], "below --window 8"),
        (["evaluate", "nowhere"], "neither a run"),
        (["generate", "RUN", ""], "prompt is empty"),
        (["chat", "RUN"], "no chat template"),
    ],
)
def test_bad_requests_end_in_one_line(arguments: list[str], says: str, run: Path) -> None:
    done = qatapult(*(str(run) if part == "RUN" else part for part in arguments))
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)


def test_the_cloze_task_asks_for_a_word_after_a_space() -> None:
    """lm-eval puts its delimiter before answers of multiple choice, and nothing before a target's likelihood."""
    from lm_eval import simple_evaluate

    manager, names = find_tasks(["cpython_cloze"])
    results = simple_evaluate(model="dummy", tasks=names, limit=3, task_manager=manager, bootstrap_iters=0)
    for sample in results["samples"]["cpython_cloze"]:
        ((context, target),) = sample["arguments"]
        assert context == sample["doc"]["context"]
        assert target == " " + sample["doc"]["word"]
