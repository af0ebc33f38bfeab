"""Any recipe that can be drawn is refused in one line, or trains: pairs of fields that make no sense are known."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from qatapult.trainer.console import Console
from qatapult.trainer.context import Context
from qatapult.trainer.data.blocks import TokenizedData, load_data
from qatapult.trainer.loop.blockwise import train_blockwise
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import StepResult, Trainer
from qatapult.trainer.models import empty_model, load_tokenizer
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.prepare import layer_grids
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.stages import ptq
from qatapult.trainer.stages.training import build_teacher
from qatapult.trainer.tracking.trackers import Tracking

#: What people set together; pairs of them are drawn, and single fields changed on top.
FEATURES: list[dict[str, Any]] = [
    {},
    {"quantization.weights": {"bits": 4, "granularity": "group", "group_size": 32}, "quantization.activations": None},
    {"quantization.weights": {"bits": 8, "granularity": "tensor"}},
    {"quantization.weights": {"bits": 4, "symmetric": False}, "qat.method": "lsq+"},
    {"quantization.weights": {"bits": 2, "grid": "stretched"}, "qat.method": "seq", "export": []},
    {"quantization.weights": {"bits": 1.58, "range": "absmean"}, "qat.method": "ternary", "export": []},
    {"quantization.weights": {"bits": 1, "grid": "stretched", "range": "mse"}, "qat.method": "binary", "export": []},
    {"quantization.weights": None, "export": []},
    {"quantization.activations": None},
    {"quantization.activations": {"bits": 8, "granularity": "tensor"}, "export": []},
    {"quantization.activations": {"bits": 4, "granularity": "token", "symmetric": False}, "export": ["safetensors"]},
    {"quantization.kv_cache": {"bits": 4, "granularity": "token", "symmetric": False}},
    {"quantization.embeddings": {"bits": 8}},
    {"quantization.overrides": [{"match": "*.down_proj", "weights": {"bits": 8}}]},
    {"quantization.overrides": [{"match": "*.v_proj", "activations": None}]},
    {"quantization.overrides": [{"match": "*.v_proj", "weights": {"bits": 8}, "activations": None}], "export": []},
    {"quantization": {"deployment": "gguf-q4_0"}},
    {"quantization": {"deployment": "gguf-q4_1"}},
    {"quantization.deployment": "torchao", "quantization.activations": None},
    {"quantization.deployment": "compressed-tensors"},
    {"qat.method": "minmax"},
    {"qat.method": "pact", "export": []},
    {"qat.trainable": "scales"},
    {"qat.trainable": "lora"},
    {"qat.trainable": "all"},
    {"qat.blockwise_tokens": 256},
    {"qat.schedule.weights_start": 0.5},
    {"qat.schedule.activations_start": 0.5},
    {"qat.schedule.phases": [{"weights": {"bits": 8}, "fraction": 0.5}, {"weights": {"bits": 4}, "fraction": 0.5}]},
    {"qat.integer_forward": True},
    {"qat.gradient_checkpointing": True},
    {"qat.distillation.kind": "none"},
    {"qat.distillation.kind": "reverse_kl", "qat.distillation.cross_entropy": 0.5},
    {"qat.distillation.kind": "jsd", "qat.distillation.temperature": 2.0},
    {"qat.distillation.hidden": {}},
    {"qat.distillation.attention": {"heads": 4}},
    {"qat.distillation.cache": "somewhere"},
    {"ptq.methods": ["gptq"]},
    {"ptq.methods": ["gptq"], "ptq.initialize_from": "gptq"},
    {"ptq.methods": ["awq"], "ptq.initialize_from": "awq"},
    {"ptq.methods": ["smoothquant"], "ptq.initialize_from": "smoothquant"},
    {"ptq.methods": ["hadamard"], "ptq.initialize_from": "hadamard"},
    {"ptq.methods": ["mse"], "ptq.initialize_from": "mse"},
    {"data.train": [{"kind": "random"}]},
    {"model.source": "random:tiny-tied"},
    {"export": ["safetensors"]},
    {"export": ["gguf"]},
]  # fmt: skip
CHANGES: dict[str, list[Any]] = {
    "quantization.weights.bits": [8, 4, 3, 2, 1.58, 1],
    "quantization.weights.range": ["minmax", "mse", "percentile", "absmean"],
    "quantization.weights.granularity": ["tensor", "channel", "token"],
    "quantization.weights.symmetric": [True, False],
    "quantization.weights.grid": ["integer", "stretched"],
    "quantization.weights.scale_dtype": ["float32", "bfloat16", "float16"],
    "quantization.activations.range": ["minmax", "mse", "percentile", "absmean"],
    "quantization.skip": [[], ["lm_head"], ["*.mlp.*"]],
    "qat.method": ["lsq", "lsq+", "minmax", "pact", "seq", "ternary", "binary"],
    "qat.distillation.beta": [0.0, 0.3],
    "qat.distillation.cross_entropy": [0.5, 1.0],
    "qat.optimizer.weight_decay": [0.1],
    "ptq.initialize_from": ["rtn", "gptq", "awq", "mse"],
    "data.held_out": [{"kind": "random"}, {"kind": "cpython_docs", "documents": 3}],
    "export": [[], ["torchao"], ["compressed-tensors"]],
    "tracking.upload_checkpoint": [True],
}
BASE = [
    "data.train=[{kind: cpython_docs, documents: 8}]",
    "data.block_size=16",
    "data.evaluation_blocks=2",
    "ptq.calibration.blocks=2",
    "qat.tokens=64",
    "qat.optimizer.learning_rate=1e-4",
]


@st.composite
def overrides(draw: st.DrawFn) -> tuple[str, ...]:
    chosen: dict[str, Any] = {}
    for feature in draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3)):
        chosen |= feature
    for field in draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=2, unique=True)):
        chosen[field] = draw(st.sampled_from(CHANGES[field]))
    # Whole sections first: what belongs into them comes after.
    ordered = sorted(chosen, key=lambda field: field.count("."))
    return tuple(f"{field}={json.dumps(chosen[field])}" for field in ordered)


@cache
def text(source: str) -> TokenizedData:
    recipe = load_recipe("tiny-random-w4a8", [*BASE, f"model.source={source}"])
    return load_data(recipe, load_tokenizer(recipe.model))


def trained_step(recipe: Recipe, folder: Path) -> StepResult:
    """Quantize, train one step as the stages would, and pack."""
    run = RunFolder(folder)
    accelerator = Accelerator(cpu=True)
    context = Context(recipe, run, accelerator, Console(quiet=True), Tracking(accelerator, recipe, run))
    random = recipe.data.train[0].kind == "random"
    context.data = load_data(recipe, context.tokenizer) if random else text(recipe.model.source)
    start = recipe.ptq.initialize_from
    method = recipe.ptq.methods[0] if start == "best" else start
    ptq.save_model(context, ptq.quantize(context, method))
    model = ptq.load_quantized(context)
    if recipe.qat.blockwise_tokens:
        train_blockwise(model, context.load_model(), context.data.train, recipe, lambda _: None)
    if recipe.qat.trainable == "lora":
        lora.add_adapters(model, recipe.qat.lora_rank)
    trainer = Trainer(
        accelerator,
        recipe,
        model,
        build_teacher(context, model),
        context.data,
        run.checkpoints,
        MetricsLog(None),
        context.console,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = trainer.step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    if recipe.qat.trainable != "lora":
        assert torch.isfinite(convert(model)(context.data.held_out).logits).all()
    return result


def drawn(changes: tuple[str, ...]) -> Recipe | str:
    """The recipe, or why it is refused."""
    try:
        recipe = load_recipe("tiny-random-w4a8", [*BASE, *changes])
        layer_grids(empty_model(recipe.model), recipe.quantization)
    except UserError as error:
        return str(error)
    return recipe


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(overrides())
def test_a_recipe_is_refused_in_one_line_or_it_trains(changes: tuple[str, ...]) -> None:
    recipe = drawn(changes)
    if isinstance(recipe, str):
        event("refused")
        assert "\n" not in recipe
        assert len(recipe) < 400
    elif recipe.qat.distillation.cache is not None:
        event("trains from a cache: see its own tests")
    else:
        event("trained")
        with TemporaryDirectory() as folder:
            assert math.isfinite(trained_step(recipe, Path(folder)).loss)


PHASES = "qat.schedule.phases=[{weights: {bits: 8}, fraction: 0.5}, {weights: {bits: 4}, fraction: 0.5}]"
NO_WEIGHTS = "quantization.weights=null"
NO_INPUTS = "quantization.activations=null"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["qat.method=ternary"], "needs quantization.weights.bits=1.58"),
        (["quantization.weights={bits: 1, grid: stretched, range: mse}"], "does not train 1-bit weights"),
        (["quantization.overrides=[{match: '*.v_proj', weights: {bits: 1, grid: stretched, range: mse}}]"], "1-bit"),
        (["qat.method=lsq+"], "symmetric=false"),
        (["qat.method=seq"], "grid=stretched"),
        (["qat.method=pact", NO_INPUTS], "set quantization.activations"),
        (["qat.method=minmax", NO_WEIGHTS, "export=[]"], "rule for the weights' scales"),
        (["qat.method=minmax", "qat.trainable=scales"], "which learns none"),
        (["qat.trainable=scales", NO_WEIGHTS, "export=[]"], "nothing to train"),
        (["qat.trainable=scales", "qat.optimizer.weight_decay=0.1"], "set it to 0"),
        (["qat.trainable=lora", NO_WEIGHTS, "export=[]"], "set quantization.weights"),
        (["qat.integer_forward=true", NO_INPUTS], "quantize both"),
        (["ptq.initialize_from=gptq"], "add it to ptq.methods"),
        (["ptq.methods=[gptq]", "qat.method=minmax"], "computes them anew"),
        (["ptq.methods=[gptq]", NO_WEIGHTS, "export=[]"], "rounds weights"),
        (["ptq.methods=[smoothquant]", NO_INPUTS], "quantize both"),
        (["ptq.methods=[hadamard]", "qat.distillation.hidden={}"], "rotates the student's"),
        (["ptq.methods=[hadamard]", "qat.distillation.attention={heads: 8}"], "leave heads out"),
        (["ptq.methods=[hadamard]", "qat.blockwise_tokens=64"], "rotates them"),
        (["qat.blockwise_tokens=64", PHASES], "leaves it again"),
        ([PHASES, "quantization.weights.bits=3", "export=[]"], "must end at"),
        ([PHASES, NO_WEIGHTS, "export=[]"], "must end at"),
        ([PHASES.replace("8}", "8, granularity: tensor}")], "keep one granularity"),
        ([PHASES.replace("8}", "8, symmetric: false}")], "keep one symmetric"),
        ([PHASES.replace("8}", "3}")], "must not go up"),
        ([PHASES, "quantization.embeddings={bits: 8}"], "every layer on one grid"),
        ([PHASES, "qat.trainable=scales"], "nothing would be left"),
        ([PHASES, "qat.schedule.weights_start=0.5"], "skips the first"),
        ([PHASES, "qat.tokens=32"], "after the last of 1 steps"),
        (["qat.blockwise_offload=true"], "set qat.blockwise_tokens"),
        (["qat.schedule.weights_start=1.0"], "never quantizes"),
        (["qat.schedule.weights_start=0.5", NO_WEIGHTS, "export=[]"], "delays nothing"),
        (["qat.schedule.weights_start=0.5", "qat.trainable=scales"], "nothing to train before"),
        (["qat.distillation.kind=none", "qat.distillation.teacher=x"], "uses no teacher"),
        (["qat.distillation.kind=none", "qat.distillation.cross_entropy=0.5"], "cross-entropy alone"),
        (["qat.distillation.kind=none", "qat.distillation.hidden={}"], "needs a teacher"),
        (["qat.distillation.cache=x", "qat.distillation.hidden={}"], "holds its logits alone"),
        (["qat.distillation.cross_entropy=1.0"], "use kind 'none'"),
        (["qat.distillation.beta=0.3"], "belongs to kind 'jsd'"),
        (["qat.distillation={kind: jsd, beta: 1.0}"], "between 0 and 1"),
        (["data.train=[{kind: random}, {kind: cpython_docs}]"], "stand alone"),
        (["data.held_out={kind: random}"], "leave held_out out"),
        (["data.train=[{kind: random}]", "evaluation.generate=4"], "continues held-out text"),
        (["quantization.weights.bits=3"], "leave 'compressed-tensors' out"),
        (["export=[gguf]"], "set quantization.deployment"),
        (["export=[torchao]", NO_INPUTS, "quantization.overrides=[{match: '*.v_proj', weights: {bits: 8}}]"],
         "different grids"),
        (["qat.method=pact"], "no form for the clips"),
        (["quantization.activations.range=mse"], "runtimes take 'minmax'"),
        (["quantization.activations.granularity=tensor"], "no integer product"),
        (["quantization.weights.range=absmean"], "ternary and binary"),
        (["quantization.weights={bits: 1.58}", "qat.method=ternary"], "use 'absmean' or 'mse'"),
        (["quantization.embeddings={bits: 8, granularity: token}"], "is for activations"),
        (["quantization.kv_cache={bits: 8}"], "must be 'token'"),
        (["quantization.kv_cache={bits: 1.58, granularity: token, range: mse}"], "8, 4, 3 or 2 bits"),
        (["tracking.upload_checkpoint=true"], "add wandb"),
        (["qat.optimizer.learning_rate=-1.0"], "learning_rate"),
        (["qat.optimizer.betas=[0.9, 1.0]"], "betas"),
        (["qat.distillation.temperature=.inf"], "temperature"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_named(changes: list[str], message: str) -> None:
    refusal = drawn(tuple(changes))
    assert isinstance(refusal, str)
    assert message in refusal
