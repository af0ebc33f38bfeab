"""The model that serves: the packed one, with compiled layers, norms, gates and attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from qatapult.kernels import FusedLayer
from qatapult.kernels.int_gemm import vnni
from qatapult.trainer.evaluate.kernels import counting
from qatapult.trainer.evaluate.parity import compare
from qatapult.trainer.quantize import serve as serving
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.kv_cache import PackedKVCache
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.quantize.serve import ServedLayer, cast, serve
from qatapult.trainer.recipe.schema import Quantization, TensorScheme

GRIDS: dict[str, dict[str, Any]] = {
    "w4a8": {"weights": {"bits": 4}},
    "w4a8-g32-asymmetric": {
        "weights": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False}
    },
    "w8a8": {"weights": {"bits": 8}},
}
needs_vnni = pytest.mark.skipif(not vnni.available(), reason="no AVX512-VNNI, or no C++ compiler")


def prepared(grid: str = "w4a8", bias: bool = False, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    activations = {"bits": 8, "granularity": "token"}
    quantization = GRIDS[grid] | {"activations": activations} | more
    prepare(model, Quantization.model_validate(quantization))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(1))


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_compiled_layer_has_the_bits_of_its_parts(
    grid: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = cast(convert(prepared(grid, bias)), dtype)
    compiled, parts = serve(copy.deepcopy(packed)), serve(packed)
    results = []
    for model in (compiled, parts):
        cache = DynamicCache()
        logits = [
            model(chunk, past_key_values=cache).logits for chunk in (ids(2, 9), ids(2, 1), ids(2, 1) + 1)
        ]
        results.append(torch.cat(logits, 1))
        monkeypatch.setattr(FusedLayer, "fits", lambda *arguments: False)
    assert compiled.model.layers[0].__dict__["_fused"][1] is not None
    assert parts.model.layers[0].__dict__["_fused"][1] is None
    assert torch.equal(*results)


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
def test_parity_with_the_trained_model_in_the_same_arithmetic(grid: str) -> None:
    trained = prepared(grid)
    packed = serve(convert(trained))
    parity = compare(serve(trained), packed, ids(2, 33))
    assert parity["codes_equal"]
    assert parity["sqnr_db"] >= 40
    assert parity["top1_agreement"] >= 0.995


@torch.no_grad()
def test_products_inside_of_compiled_layers_are_counted() -> None:
    packed = serve(convert(prepared()))
    with counting(packed) as kernels:
        packed(ids(2, 5))
        packed(ids(1, 1))
    assert kernels["integer"] == kernels["linears"] == 14
    assert kernels["products"] == {"integer": 28, "float": 0}


@torch.no_grad()
def test_it_is_the_model_of_transformers_up_to_rounding() -> None:
    """Without int8 inputs nothing magnifies a rounding."""
    plain = prepared(activations=None)
    served = serve(copy.deepcopy(plain))
    assert type(served.model.layers[0]) is ServedLayer
    for tokens in (ids(2, 70), ids(1, 1)):
        torch.testing.assert_close(served(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_batches_and_one_token_at_a_time() -> None:
    served = serve(convert(prepared()))
    tokens = ids(1, 12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(tokens)], 1)
    both = torch.cat([padded, ids(1, 16)])
    whole = served(tokens).logits[0, -1]
    masked = served(both, attention_mask=torch.cat([mask, torch.ones(1, 16, dtype=torch.int64)])).logits
    assert float((masked[0, -1] - whole).square().sum() / whole.square().sum()) < 0.01
    cache = DynamicCache()
    steps = [served(token, past_key_values=cache).logits[0, -1] for token in tokens.split(1, dim=1)]
    assert float((steps[-1] - whole).square().sum() / whole.square().sum()) < 0.01


@torch.no_grad()
def test_with_a_packed_kv_cache() -> None:
    grid = TensorScheme(bits=8, granularity="token")
    served = serve(convert(prepared(kv_cache=grid)))
    cache = PackedKVCache(grid.scheme)
    steps = [served(token, past_key_values=cache).logits[0, -1] for token in ids(1, 9).split(1, dim=1)]
    whole = served(ids(1, 9)).logits[0, -1]
    assert float((steps[-1] - whole).square().sum() / whole.square().sum()) < 0.01


def test_gradients_flow_through_stock_modules() -> None:
    model = serve(prepared())
    model(ids(1, 5)).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@torch.no_grad()
def test_a_model_that_changed_its_dtype_is_compiled_again() -> None:
    served = serve(convert(prepared()))
    first = served(ids(1, 5)).logits
    half = cast(served, torch.bfloat16)(ids(1, 5)).logits
    assert (first.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(cast(serve(convert(prepared())), torch.bfloat16)(ids(1, 5)).logits, half)


def test_other_models_stay_as_they_are() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in serve(model).modules()] == kinds
    assert model.config._attn_implementation != serving._ATTENTION
