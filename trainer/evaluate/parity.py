"""Parity of the packed model with the fake-quantized one that was trained.

The trained model is asked in the arithmetic that is served: the integer forward of training (`quantized_linear` with
mode `integer`), whichever of its two forwards the device trained with. In fp32 on fake-quantized values it is the same
function up to rounding, and yet not comparable beyond the noise of the activations' own grid: an input that one
rounding moves across the border of two int8 codes differs by a whole step, and such steps are what the next layers see.
What that makes of the logits is reported beside the parity, as `fake_arithmetic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.kernels import unpack
from qatapult.trainer.evaluate.perplexity import last_hidden
from qatapult.trainer.quantize.convert import PackedLinear, packed_layers
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.prepare import quant_layers

#: What the packed model has to reach against the trained one.
LEAST_SQNR_DB = 40.0
LEAST_TOP1_AGREEMENT = 0.995

Mode = Literal["integer", "fake"]

# Logits held at a time.
_CHUNK = 64
# Beyond this a difference is rounding noise of the measurement itself.
_HIGHEST_DB = 200.0


@torch.no_grad()
def compare(trained: PreTrainedModel, packed: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Codes bit for bit; logits by signal-to-quantization-noise ratio and by the most likely token.

    Args:
        trained: the prepared model.
        packed: what `convert` made of it.
        ids: token ids, int64 `[B, S]`.

    Returns:
        `{"codes_equal", "sqnr_db", "top1_agreement", "layers"}`. Each layer has `name`, `bits`,
        `granularity`, `codes_equal`, `bytes`, and `sqnr_db` of its output for the very input that the trained
        model gives it. Where inputs are quantized, also `"fake_arithmetic": {"sqnr_db", "top1_agreement"}`: the same
        against the trained model computing on fake-quantized values.
    """
    quantized, integers = quant_layers(trained), packed_layers(packed)
    noise = {name: _Noise() for name in integers}
    with arithmetic(quantized, "integer"), _comparing_layers(quantized, integers, noise):
        expected = last_hidden(trained, ids).flatten(0, 1)
    actual = last_hidden(packed, ids).flatten(0, 1)
    layers = [_layer(name, layer, quantized[name], noise[name]) for name, layer in integers.items()]
    result: dict[str, Any] = {"codes_equal": all(layer["codes_equal"] for layer in layers)}
    result |= _logits(trained, packed, expected, actual)
    if any(layer.activation_scheme is not None for layer in integers.values()):
        with arithmetic(quantized, "fake"):
            faked = last_hidden(trained, ids).flatten(0, 1)
        result["fake_arithmetic"] = _logits(trained, packed, faked, actual)
    return result | {"layers": layers}


def _logits(
    trained: PreTrainedModel, packed: PreTrainedModel, expected: Tensor, actual: Tensor
) -> dict[str, float]:
    """Of hidden states `[T, D]` of both models: the logits' noise and how often the most likely token agrees."""
    total, agreeing = _Noise(), 0
    for ours, theirs in zip(expected.split(_CHUNK), actual.split(_CHUNK), strict=True):
        logits = trained.get_output_embeddings()(ours)
        others = packed.get_output_embeddings()(theirs)
        total.add(logits, others)
        agreeing += int((logits.argmax(-1) == others.argmax(-1)).sum())
    return {"sqnr_db": total.decibels, "top1_agreement": agreeing / len(expected)}


def shortfall(parity: dict[str, Any]) -> str | None:
    """What of the parity is not reached, in one line; None where all is."""
    if not parity["codes_equal"]:
        wrong = [layer["name"] for layer in parity["layers"] if not layer["codes_equal"]]
        return f"codes differ in {len(wrong)} layers, first {wrong[0]}"
    if parity["sqnr_db"] < LEAST_SQNR_DB or parity["top1_agreement"] < LEAST_TOP1_AGREEMENT:
        worst = min(parity["layers"], key=lambda layer: layer["sqnr_db"])
        return (
            f"logits at {parity['sqnr_db']:.1f} dB, the same top token on {parity['top1_agreement']:.2%} "
            f"(aim: {LEAST_SQNR_DB:g} dB, {LEAST_TOP1_AGREEMENT:.1%}); the worst layer is {worst['name']} "
            f"with {worst['sqnr_db']:.1f} dB"
        )
    return None


class _Noise:
    """Sums of squares of a signal and of its error."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.error = 0.0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        self.signal += float(expected.double().square().sum())
        self.error += float((expected.double() - actual.double()).square().sum())

    @property
    def decibels(self) -> float:
        if self.error <= self.signal * 10 ** (-_HIGHEST_DB / 10):
            return _HIGHEST_DB
        return float(10 * torch.log10(torch.tensor(self.signal / self.error)))


@contextmanager
def arithmetic(layers: dict[str, QuantizedWeight], mode: Mode) -> Iterator[None]:
    """Inside, quantized layers multiply codes (`integer`) or fake-quantized values (`fake`)."""
    before = {name: layer.integer_forward for name, layer in layers.items()}
    for layer in layers.values():
        layer.integer_forward = mode
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.integer_forward = before[name]


@contextmanager
def _comparing_layers(
    quantized: dict[str, QuantizedWeight], integers: dict[str, PackedLinear], noise: dict[str, _Noise]
) -> Iterator[None]:
    """Inside, every quantized layer that runs also runs packed, on the same input."""

    def compare_output(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            noise[name].add(output, integers[name](inputs[0]))

        return hook

    handles = [quantized[name].register_forward_hook(compare_output(name)) for name in integers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str, packed: PackedLinear, trained: QuantizedWeight, noise: _Noise) -> dict[str, Any]:
    codes = unpack(packed.packed, packed.weight_scheme, packed.in_features)
    return {
        "name": name,
        "bits": packed.weight_scheme.bits,
        "granularity": packed.weight_scheme.granularity,
        "codes_equal": bool(torch.equal(codes, trained.codes())),
        "sqnr_db": noise.decibels,
        "bytes": packed.nbytes,
    }
