"""SmoothQuant, AWQ and rotations: the full-precision function stays, the quantized one gets better."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model
from torch import nn

from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare, quant_layers
from qatapult.trainer.quantize.ptq import awq, hadamard, smoothquant, spinquant
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks, full_precision
from qatapult.trainer.quantize.ptq.folding import choose_ranges_again, folds_of
from qatapult.trainer.quantize.ptq.rotation import fold_norms, random_hadamard, rotate, untie_for
from qatapult.trainer.quantize.ptq.rotation import hadamard as hadamard_matrix
from qatapult.trainer.recipe import schema
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe

Grid = schema.TensorScheme


def outlier_model(shape: str = "tiny") -> tuple[nn.Module, torch.Tensor]:
    """A small model with loud channels in every norm, as trained models have them, and text for it."""
    model = load_model(schema.Model(source=f"random:{shape}"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
                parameter[::16] *= 20
            elif "embed" not in name:
                parameter.mul_(2)
    return model, torch.randint(0, model.config.vocab_size, (6, 32), generator=generator)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def quantization(weights: int, activations: int | None) -> schema.Quantization:
    return schema.Quantization(
        weights=Grid(bits=weights),
        activations=Grid(bits=activations, granularity="token") if activations else None,
    )


@pytest.mark.parametrize("shape", ["tiny", "tiny-tied"])
@pytest.mark.parametrize("method", [smoothquant, awq, hadamard])
def test_function_in_full_precision_stays(method, shape: str) -> None:
    if method is hadamard:
        model, ids = outlier_model(shape)
        before = logits(model, ids)
        hadamard.rotate_randomly(model)
        after = logits(model, ids)
    else:
        model, ids = outlier_model(shape)
        grid = quantization(4, 8)
        before = logits(model, ids)
        prepare(model, grid)
        method.quantize(model, ids, schema.Ptq(), grid)
        with full_precision(model):
            after = logits(model, ids)
    assert not any(
        torch.equal(old, new)
        for old, new in zip(
            decoder_blocks(outlier_model(shape)[0]).parameters(),
            decoder_blocks(model).parameters(),
            strict=False,
        )
        if old.ndim == 2
    )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("method", "weights", "activations"), [(smoothquant, 8, 8), (awq, 3, None), (hadamard, 8, 8)]
)
def test_outputs_are_closer_than_round_to_nearest(method, weights: int, activations: int | None) -> None:
    model, ids = outlier_model()
    reference = logits(model, ids)
    grid = quantization(weights, activations)
    prepare(model, grid)
    nearest = (logits(model, ids) - reference).square().mean()
    method.quantize(model, ids, schema.Ptq(), grid)
    error = (logits(model, ids) - reference).square().mean()
    assert error < 0.8 * nearest
    assert all(layer.codes().dtype == torch.int8 for layer in quant_layers(model).values())


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 112, 576])
def test_hadamard_matrices_are_hadamard(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix is not None
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    torch.testing.assert_close(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 10, 48, 576])
def test_random_rotations_are_orthogonal_for_any_size(size: int) -> None:
    turn = random_hadamard(size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn @ turn.t(), torch.eye(size, dtype=torch.float64))


def test_a_rotation_spreads_an_outlier() -> None:
    spike = torch.zeros(576, dtype=torch.float64)
    spike[17] = 1
    turned = spike @ random_hadamard(576, torch.Generator().manual_seed(1))
    torch.testing.assert_close(turned.abs(), torch.full_like(spike, 1 / math.sqrt(576)))


def test_rotation_takes_tied_embeddings_apart(tmp_path: Path) -> None:
    model, ids = outlier_model("tiny-tied")
    fold_norms(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    save_model(model, str(tmp_path / "rotated.safetensors"))
    loaded, _ = outlier_model("tiny-tied")
    save_model(loaded, str(tmp_path / "tied.safetensors"))
    untie_for(loaded, tmp_path / "tied.safetensors")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untie_for(loaded, tmp_path / "rotated.safetensors")
    load_tensors(loaded, str(tmp_path / "rotated.safetensors"))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


def test_cayley_steps_stay_orthogonal_and_descend() -> None:
    generator = torch.Generator().manual_seed(3)
    goal = random_hadamard(20, generator).float()
    turn = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    if torch.det(turn) * torch.det(goal) < 0:  # rotations cannot leave their half of the manifold
        turn[0] *= -1
    begun = (turn - goal).square().sum()
    for _ in range(1000):
        turn = spinquant.cayley_step(turn, 2 * (turn - goal), rate=0.2)
    torch.testing.assert_close(turn @ turn.t(), torch.eye(20), rtol=0, atol=1e-5)
    assert (turn - goal).square().sum() < 0.5 * begun


def test_a_learned_rotation_lowers_the_quantized_loss_and_keeps_the_function() -> None:
    model, ids = outlier_model("tiny-tied")
    before = logits(model, ids)
    prepare(model, quantization(4, 8))
    hadamard.rotate_randomly(model)
    choose_ranges_again(model)
    drawn = spinquant.rotated_loss(model, torch.eye(64), ids)
    turn = spinquant.learn_rotation(model, ids, steps=60)
    assert spinquant.rotated_loss(model, turn, ids) < drawn
    rotate(model, turn.double(), None)
    choose_ranges_again(model)
    with full_precision(model):
        after = logits(model, ids)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_values_shared_by_query_heads_get_equal_factors() -> None:
    model, ids = outlier_model()
    before = logits(model, ids)
    _, values, _, _ = folds_of(decoder_blocks(model)[0])
    assert values.repeats == 2
    factor = values.shared(torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5)
    values.apply(factor)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-4)


def test_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="use rtn or gptq"):
        list(folds_of(nn.TransformerEncoderLayer(16, 2)))


@pytest.mark.slow
def test_a_trained_model_is_the_same_to_rounding_after_rotation() -> None:
    pytest.importorskip("gguf")
    recipe = load_recipe("smollm2-135m-w4a8", ["data.block_size=128"])
    model = load_model(recipe.model)
    ids = load_data(recipe, load_tokenizer(recipe.model)).held_out[:2]
    before = logits(model, ids)
    hadamard.rotate_randomly(model)
    difference = (logits(model, ids) - before).norm() / before.norm()
    assert float(difference) < 1e-5
