"""Stage `packed`: the truth. The model is evaluated as the packed integers that will be served."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from qatapult.trainer.context import Context
from qatapult.trainer.evaluate.kernels import counting
from qatapult.trainer.evaluate.parity import compare, shortfall
from qatapult.trainer.insight.rounding import rounding
from qatapult.trainer.quantize.convert import convert, packed_layers
from qatapult.trainer.quantize.serve import serve
from qatapult.trainer.stages.training import load_trained

# Blocks on which the logits of the packed and the fake-quantized model are compared.
_PARITY_BLOCKS = 2


def run(context: Context) -> dict[str, Any]:
    """Pack the trained model, evaluate it, and compare it with the fake-quantized one."""
    meter = context.meter()
    trained = load_trained(context)
    packed = serve(convert(trained))
    parity = compare(serve(trained), packed, context.data.held_out[:_PARITY_BLOCKS].to(context.device))
    rounded = rounding(trained)
    del trained
    short = shortfall(parity)
    if short is not None:
        context.console.warn(f"packed and trained model: {short}")
    with counting(packed) as kernels:
        result = context.perplexity(packed, "packed")
        judged = context.judge(packed, "packed")
    return {
        "perplexity": result.value,
        "losses": result.losses,
        **judged,
        "parity": parity,
        "rounding": rounded,
        "kernels": kernels,
        "bytes": model_bytes(packed),
        "cost": meter.cost(result.tokens),
    }


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model as it is stored: packed codes and scales, and 16 bits for what is not quantized."""
    packed = sum(layer.nbytes for layer in packed_layers(model).values())
    return packed + 2 * sum(parameter.numel() for parameter in model.parameters())
