"""SpinQuant: learn the rotation of the residual stream instead of drawing it, then GPTQ.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, sections 3.2 and 4.1,
without the online rotations (R3, R4): starting from a random Hadamard rotation, `R1` is trained on
calibration text by Cayley SGD (Li et al., arXiv:2002.01113), whose steps stay on the manifold of orthogonal
matrices. Weights stay as they are; rounding passes gradients straight through. The loss is the divergence
from the full-precision model's own predictions instead of the next token's, so that nothing is learned but to
round well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from qatapult.kernels import choose_range
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.ptq import gptq
from qatapult.trainer.quantize.ptq.calibration import decoder_blocks, full_precision
from qatapult.trainer.quantize.ptq.folding import choose_ranges_again, folds_of
from qatapult.trainer.quantize.ptq.hadamard import rotate_randomly
from qatapult.trainer.quantize.ptq.rotation import rotate
from qatapult.trainer.recipe import schema

_STEPS = 100
_RATE = 1.5
# Longest step, as a share of the rotation's own Frobenius norm.
_LONGEST = 0.001
# Gradients pass straight through the rounding, so the quantized loss jumps along the way and its last value is
# as good as any near it (±10 % on a small model): of the rotations that are compared every so many steps, the
# one with the least loss on this many blocks is kept.
_COMPARE_EVERY = 10
_PROOF = 8


def quantize(
    model: PreTrainedModel, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Rotate a prepared model in place by a learned rotation, choose the scales anew, and run GPTQ.

    Args:
        model: a prepared model with LLaMA-class blocks.
        calibration: token ids `[n, block]`; one block a step.
        settings: GPTQ's.
        quantization: not needed here; every method takes it.

    Raises:
        UserError: for blocks of another structure.
    """
    rotate_randomly(model)
    choose_ranges_again(model)
    rotate(model, learn_rotation(model, calibration).double(), None)
    choose_ranges_again(model)
    gptq.quantize(model, calibration, settings, quantization)


def learn_rotation(
    model: PreTrainedModel, calibration: Tensor, steps: int = _STEPS, rate: float = _RATE
) -> Tensor:
    """The rotation of the residual stream under which the quantized model is nearest to the original.

    Args:
        model: prepared, with folded norms.
        calibration: token ids `[n, block]`, gone through again and again.
        steps: of Cayley SGD.
        rate: the first step's learning rate; it falls linearly to zero.

    Returns:
        Orthogonal `[D, D]`, fp32, to be applied by `rotate`: the best of those on the way, the identity if none
        was better.
    """
    device, size = next(model.parameters()).device, int(model.config.hidden_size)
    turn = best = torch.eye(size, device=device)
    proof = calibration[:_PROOF].to(device)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    least = _loss_of(model, best, proof)
    for step in range(steps):
        ids = calibration[step % len(calibration)].unsqueeze(0).to(device)
        turn = turn.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(rotated_loss(model, turn, ids), turn)
        turn = cayley_step(turn, gradient, rate * (1 - step / steps))
        if (step + 1) % _COMPARE_EVERY == 0 or step + 1 == steps:
            loss = _loss_of(model, turn, proof)
            if loss < least:
                best, least = turn, loss
    for parameter in frozen:
        parameter.requires_grad_(True)
    return best


def rotated_loss(model: PreTrainedModel, turn: Tensor, ids: Tensor) -> Tensor:
    """Divergence of the quantized model with its residual stream turned from the full-precision one.

    Args:
        model: prepared, with folded norms.
        turn: orthogonal `[D, D]`.
        ids: token ids `[B, S]`.

    Returns:
        Mean forward KL a token in nats, differentiable in the rotation.
    """
    with torch.no_grad(), full_precision(model):
        goal = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    turned = dict(_turned_weights(model, turn))
    logits = functional_call(model, turned, kwargs={"input_ids": ids, "use_cache": False}).logits
    found = logits.float().log_softmax(-1)
    return kl_div(found.flatten(0, 1), goal.flatten(0, 1), reduction="batchmean", log_target=True)


@torch.no_grad()
def _loss_of(model: PreTrainedModel, turn: Tensor, blocks: Tensor) -> float:
    """`rotated_loss` of blocks `[n, S]`, with the logits of one at a time in memory."""
    return sum(float(rotated_loss(model, turn, ids)) for ids in blocks.split(1)) / len(blocks)


@torch.no_grad()
def cayley_step(turn: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One descent step along the Cayley curve through an orthogonal matrix.

    Args:
        turn: orthogonal `[D, D]`. gradient: of the loss by it. rate: length; shortened to a thousandth of the
        rotation's norm, for gradients through rounding are noisy.

    Returns:
        `(I + α/2 Y)⁻¹ (I − α/2 Y) R` with the skew-symmetric `Y = G Rᵀ − R Gᵀ`: orthogonal again.
    """
    skew = gradient @ turn.t()
    skew = skew - skew.t()
    rate = min(rate, _LONGEST * len(turn) ** 0.5 / max(float(skew.norm()), 1e-12))
    identity = torch.eye(len(turn), dtype=torch.float64, device=turn.device)
    half = skew.double() * (rate / 2)
    return torch.linalg.solve(identity + half, (identity - half) @ turn.double()).to(turn.dtype)


def _turned_weights(model: PreTrainedModel, turn: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Weights, and the scales that go with them, as `rotate` would make them."""
    names = {module: name for name, module in model.named_modules()}
    readers: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    writers: list[nn.Module] = []
    for block in decoder_blocks(model):
        inputs, values, hidden, product = folds_of(block)
        readers += [*inputs.consumers, *hidden.consumers]
        writers += [*values.consumers, *product.consumers]
    for layer in readers:
        yield from _with_scales(names[layer], layer, _weight(layer) @ turn.to(_weight(layer).dtype))
    for layer in writers:
        yield from _with_scales(names[layer], layer, turn.t().to(_weight(layer).dtype) @ _weight(layer))
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            yield f"{names[layer]}.bias", bias @ turn.to(bias.dtype)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _with_scales(name: str, layer: nn.Module, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", weight
    if isinstance(layer, QuantizedWeight) and layer.weight_scheme is not None:
        scale, zero_point = choose_range(weight, layer.weight_scheme)
        yield f"{name}.weight_scale", scale
        if zero_point is not None:
            yield f"{name}.weight_zero_point", zero_point
