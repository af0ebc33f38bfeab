"""Stage `packed`: the truth. The model is evaluated as the packed integers that will be served."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.kernels import unpack
from qatapult.trainer.context import Context
from qatapult.trainer.evaluate.perplexity import last_hidden
from qatapult.trainer.quantize.convert import PackedLinear, convert, packed_layers
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.stages.qat import load_trained

# Tokens on which the logits of the packed and the fake-quantized model are compared.
_PARITY_BLOCKS = 2
_CHUNK = 64


def run(context: Context) -> dict[str, Any]:
    """Pack the trained model, evaluate it, and compare it with the fake-quantized one."""
    meter = context.meter()
    trained = load_trained(context)
    packed = convert(trained)
    parity = compare(trained, packed, context.data.held_out[:_PARITY_BLOCKS].to(context.device))
    del trained
    for layer in packed_layers(packed).values():
        layer.calls = 0
    result = context.perplexity(packed, "packed")
    layers = packed_layers(packed)
    return {
        "perplexity": result.value,
        "losses": result.losses,
        "tasks": {},
        "parity": parity,
        "kernels": count_kernels(layers),
        "bytes": model_bytes(packed),
        "cost": meter.cost(result.tokens),
    }


def count_kernels(layers: dict[str, PackedLinear]) -> dict[str, Any]:
    """Which arithmetic really ran, from the calls that the layers counted."""
    ran = Counter(layer.kind for layer in layers.values() if layer.calls > 0)
    integer = sum(1 for layer in layers.values() if layer.calls > 0 and layer.activation_scheme is not None)
    return {"linears": len(layers), "integer": integer, "by_kind": dict(ran)}


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model as it is stored: packed codes and scales, and 16 bits for what is not quantized."""
    packed = sum(layer.nbytes for layer in packed_layers(model).values())
    return packed + 2 * sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def compare(trained: PreTrainedModel, packed: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Codes bit for bit; logits by signal-to-quantization-noise ratio and by the most likely token."""
    quantized, integers = quant_layers(trained), packed_layers(packed)
    layers = []
    for name, layer in integers.items():
        codes = unpack(layer.packed, layer.weight_scheme, layer.in_features)
        layers.append(
            {
                "name": name,
                "bits": layer.weight_scheme.bits,
                "granularity": layer.weight_scheme.granularity,
                "codes_equal": bool(torch.equal(codes, quantized[name].codes())),
                "bytes": layer.nbytes,
            }
        )
    sqnr, agreement = _compare_logits(trained, packed, ids)
    return {
        "codes_equal": all(layer["codes_equal"] for layer in layers),
        "sqnr_db": sqnr,
        "top1_agreement": agreement,
        "layers": layers,
    }


def _compare_logits(trained: PreTrainedModel, packed: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    expected = last_hidden(trained, ids).flatten(0, 1)
    actual = last_hidden(packed, ids).flatten(0, 1)
    signal = noise = agreeing = 0.0
    for ours, theirs in zip(expected.split(_CHUNK), actual.split(_CHUNK), strict=True):
        logits = trained.get_output_embeddings()(ours).double()
        others = packed.get_output_embeddings()(theirs).double()
        signal += float(logits.square().sum())
        noise += float((logits - others).square().sum())
        agreeing += float((logits.argmax(-1) == others.argmax(-1)).sum())
    decibels = 10 * torch.log10(torch.tensor(signal / max(noise, signal * 1e-20))).item()
    return decibels, agreeing / len(expected)
