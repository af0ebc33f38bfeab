"""`qatapult plan`: sizes, memory by part, what fits, time, cost, and the Accelerate config it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.plan.accelerate_config import accelerate_config, deepspeed_config
from qatapult.trainer.plan.calibrate import calibrate
from qatapult.trainer.plan.hardware import find_gpu, parse_cluster
from qatapult.trainer.plan.memory import memory, saved_bytes_per_token
from qatapult.trainer.plan.model_shape import shape_from_config, shape_of
from qatapult.trainer.plan.planner import make_plan, require_fit, usable
from qatapult.trainer.plan.settings import Setting
from qatapult.trainer.plan.speed import flops_per_token
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model, Recipe

GIGA = 1e9


def recipe(model: str = "llama-2-7b", **qat: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": {"source": f"random:{model}"},
            "data": {"block_size": 2048},
            "qat": {"tokens": 100_000_000, "global_batch_tokens": 262_144} | qat,
        }
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_known_shapes_have_the_published_number_of_weights(name: str, parameters: int) -> None:
    assert shape_of(Model(source=f"random:{name}")).parameters == parameters


def test_shape_is_read_from_a_folder_without_its_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 384}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = shape_of(Model(source=str(tmp_path)))
    assert (found.kv_width, found.head_dim, found.tied) == (32, 16, False)
    with pytest.raises(UserError, match="no field 'hidden_size'"):
        shape_from_config({"num_attention_heads": 4}, "encoder")


def test_model_states_are_those_of_the_zero_paper() -> None:
    """16 bytes a trained weight, divided as in figure 1 of arXiv:1910.02054, but for weights, which stay in fp32."""
    plan, cluster = recipe(trainable="all"), parse_cluster("8xA100-80GB", 8)
    shape = shape_of(plan.model)
    states = {}
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        needs = memory(plan, shape, cluster, Setting(engine, "none", True, 1, "none"))
        states[engine] = (needs.weights + needs.gradients + needs.optimizer) / shape.parameters
    assert states == pytest.approx(
        {"ddp": 16, "zero1": 8 + 12 / 64, "zero2": 4 + 16 / 64, "zero3": 16 / 64, "fsdp2": 16 / 64}
    )


def test_teacher_is_whole_only_where_the_student_is() -> None:
    candidates = make_plan(recipe(), parse_cluster("8xA100-80GB")).candidates
    teachers = {(c.setting.engine, c.setting.teacher) for c in candidates}
    assert ("ddp", "whole") in teachers
    assert ("zero3", "sharded") in teachers
    assert ("zero3", "whole") not in teachers
    assert ("fsdp2", "whole") not in teachers
    without = make_plan(recipe(distillation={"kind": "none"}), parse_cluster("8xA100-80GB")).candidates
    assert all(c.memory.teacher == 0 for c in without)


def test_7b_does_not_fit_plain_ddp_but_fits_sharded() -> None:
    plan = make_plan(recipe(), parse_cluster("8xA100-80GB"))
    assert not any(c.fits for c in plan.candidates if c.setting.engine == "ddp")
    best = require_fit(plan)
    assert best.fits
    assert best.memory.device <= usable(plan.cluster.gpu)
    cheapest = min(c.cost for c in plan.candidates if c.fits)
    assert cheapest <= best.cost <= 1.03 * cheapest


def test_70b_on_one_l4_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"nothing fits 1 × L4-24GB: the smallest setting .* needs"
    ) as refusal:
        require_fit(make_plan(recipe("llama-2-70b"), parse_cluster("L4")))
    assert "\n" not in str(refusal.value)


def test_checkpointing_trades_memory_for_time() -> None:
    candidates = {
        (c.setting.checkpointing, c.setting.micro_batch): c
        for c in make_plan(recipe(), parse_cluster("8xA100-80GB")).candidates
        if c.setting.name == "zero3" and c.setting.teacher == "sharded"
    }
    assert candidates[True, 2].memory.activations < candidates[False, 2].memory.activations / 5
    assert candidates[True, 2].step.arithmetic > candidates[False, 2].step.arithmetic * 1.2


def test_flops_are_six_a_weight_and_two_for_the_teacher() -> None:
    shape = shape_of(Model(source="random:llama-2-7b"))
    plain = flops_per_token(shape, 1, Setting("ddp", "none", False, 1, "none"))
    distilled = flops_per_token(shape, 1, Setting("ddp", "none", False, 1, "whole"))
    multiplied = shape.parameters - shape.head_parameters  # the embedding is a look-up
    assert plain / multiplied == pytest.approx(6, rel=1e-3)
    assert distilled / plain == pytest.approx(4 / 3, rel=1e-9)


def test_more_nodes_take_less_time_and_no_less_money() -> None:
    one = require_fit(make_plan(recipe(), parse_cluster("8xA100-80GB")))
    eight = require_fit(make_plan(recipe(), parse_cluster("8xA100-80GB", 8)))
    assert one.hours / 8 <= eight.hours < one.hours
    assert eight.cost >= one.cost


@pytest.mark.parametrize(
    ("node", "nodes", "price", "message"),
    [
        ("8xA100-90GB", 1, None, "unknown GPU 'A100-90GB'; did you mean A100-"),
        ("8xA100", 1, None, "GPU 'A100' is ambiguous: A100-40GB or A100-80GB"),
        ("0xH100", 1, None, "at least one GPU"),
        ("8xH100", 0, None, "at least one GPU and one node"),
        ("8xH100", 1, -1.0, "--price -1 is negative"),
        ("eight H100", 1, None, "not COUNTxGPU"),
    ],
)
def test_bad_clusters_get_one_clear_line(node: str, nodes: int, price: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as refusal:
        parse_cluster(node, nodes, price)
    assert "\n" not in str(refusal.value)


def test_every_gpu_has_a_source_and_sane_figures() -> None:
    for name in ("A100-40GB", "A100-80GB", "H100", "H200", "B200", "L40S", "L4", "A10G", "RTX4090", "MI300X"):
        gpu = find_gpu(name)
        assert gpu.source.startswith("https://")
        assert 10 * GIGA < gpu.memory < 250 * GIGA
        assert gpu.flops <= gpu.int8_ops
        assert gpu.link <= gpu.bandwidth


def test_command_prints_json_and_writes_a_config_that_accelerate_reads(tmp_path: Path) -> None:
    config_file, plot = tmp_path / "accelerate.yaml", tmp_path / "plan.png"
    result = CliRunner().invoke(
        app,
        ["plan", "smollm2-135m-w4a8", "model.source=random:llama-2-7b", "data.block_size=2048",
         "qat.global_batch_tokens=262144", "qat.tokens=100000000", "--node", "8xA100-80GB", "--nodes", "2",
         "--price", "2", "--json", "--write", str(config_file), "--plot", str(plot)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    best = answer["recommended"]
    assert best["cost"] == pytest.approx(best["hours"] * 16 * 2)
    assert answer["cluster"]["price_is_default"] is False
    assert sum(v for k, v in best["memory_bytes"].items() if k not in ("total", "host")) == pytest.approx(
        best["memory_bytes"]["total"]
    )
    written = yaml.safe_load(config_file.read_text())
    assert (written["num_machines"], written["num_processes"]) == (2, 16)
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(config_file)).num_processes == 16
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("engine", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_config_names_the_engine(engine: str) -> None:
    setting = Setting(engine, "none", False, 1, "none")  # type: ignore[arg-type]
    config = accelerate_config(recipe(), parse_cluster("8xH100"), setting)
    if engine.startswith("zero"):
        assert config["distributed_type"] == "DEEPSPEED"
        assert deepspeed_config(setting)["zero_optimization"]["stage"] == int(engine[-1])
        offloaded = deepspeed_config(replace(setting, offload="optimizer"))
        assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    elif engine == "fsdp2":
        assert (config["distributed_type"], config["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    else:
        assert config["distributed_type"] == {"single": "NO", "ddp": "MULTI_GPU"}[engine]
    # With a DeepSpeed file Accelerate refuses a precision of its own, when the processes are already running.
    assert config.get("mixed_precision") == (None if engine.startswith("zero") else "bf16")


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_are_those_that_autograd_saves(
    integer: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes a token and block, counted in real blocks: what grows with both tokens and blocks.

    The fake-quantized forward is that of a GPU, which keeps what it has quantized.
    """
    if not integer:
        monkeypatch.setattr("qatapult.kernels.quant_linear.op._fuses", lambda x, weight: False)
    precision = "bf16" if autocast else "fp32"
    made = recipe("tiny", precision=precision, integer_forward=integer)
    shape = shape_of(made.model)
    predicted = saved_bytes_per_token(made, shape, parse_cluster("1xH100-80GB"))
    counts = {
        (layers, tokens): _saved_bytes(made, layers, tokens, autocast)
        for layers in (2, 3)
        for tokens in (32, 64)
    }
    one_block = {tokens: counts[3, tokens] - counts[2, tokens] for tokens in (32, 64)}
    assert (one_block[64] - one_block[32]) / 32 == predicted


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_on_a_cpu_have_the_probabilities_of_attention(autocast: bool) -> None:
    """Of one length: they grow with its square."""
    precision = "bf16" if autocast else "fp32"
    made = recipe("tiny", precision=precision, integer_forward=True)
    made = made.model_copy(update={"data": made.data.model_copy(update={"block_size": 64})})
    predicted = saved_bytes_per_token(made, shape_of(made.model), parse_cluster("1xCPU"))
    three, two = (_saved_bytes(made, layers, 64, autocast, composed=True) for layers in (3, 2))
    assert three - two == pytest.approx(64 * predicted, rel=0.03)  # scales and the like are not counted


def _saved_bytes(made: Recipe, layers: int, tokens: int, autocast: bool, composed: bool = False) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qatapult.trainer.loop.attention import compose_attention
    from qatapult.trainer.loop.optimizer import select_trainable
    from qatapult.trainer.quantize.prepare import prepare, quant_layers
    from qatapult.trainer.shapes import RANDOM_SHAPES

    config = AutoConfig.for_model(**RANDOM_SHAPES["tiny"] | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config)
    prepare(model, made.quantization)
    select_trainable(model, "linears")
    if composed:
        compose_attention(model)
    for layer in quant_layers(model).values():
        layer.integer_forward = "integer" if made.qat.integer_forward else "fake"
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in storages.values())


def test_calibration_adopts_what_was_measured_here() -> None:
    made = recipe("tiny", global_batch_tokens=None).model_copy(
        update={"data": Recipe.model_validate(recipe().model_dump() | {"data": {"block_size": 64}}).data}
    )
    cluster = parse_cluster("1xCPU")
    found = calibrate(made, cluster, steps=1)
    assert found.speed_applies
    best = make_plan(made, cluster, found.assumptions, found.speed)
    same = next(c for c in best.candidates if c.setting.teacher == "whole" and c.setting.micro_batch == 2)
    assert same.memory.device == pytest.approx(found.measured["peak_memory_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero2", "zero3", "fsdp2 2 processes$"])
def test_peak_memory_of_real_runs_is_planned(case: str) -> None:
    """Within 10 %, of the largest process, with all that it holds beside tensors; the benchmark has every engine."""
    script = Path(__file__).parents[2] / "benchmarks" / "training" / "plan_accuracy.py"
    command = [sys.executable, str(script), "memory", "llama-60m", f"^{case}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    [row] = done.stdout.splitlines()[2:]
    assert float(row.split("|")[-2]) == pytest.approx(1, abs=0.1), row


def test_calibration_of_no_steps_is_refused() -> None:
    with pytest.raises(UserError, match="--calibrate 0 must be at least 1"):
        calibrate(recipe("tiny"), parse_cluster("1xCPU"), steps=0)
