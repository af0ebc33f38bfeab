"""GPTQ's error beside round-to-nearest's, layer by layer.

    python benchmarks/training/ptq_layers.py --formats W4A8 W4A16g64 --json layers.json

The error of a layer is what its rounded weight does to its output, `‖(Ŵ − W) X‖² / ‖W X‖²`, on inputs X of the
model whose earlier layers GPTQ has quantized (and with quantized activations, where the format has them): the
inputs that GPTQ itself sees. It is taken on the calibration text and on held-out text; round-to-nearest is taken
with min-max ranges, on the same inputs. Ends with exit status 1 if GPTQ's error is not the smaller one in every layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ptq import grids
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult import kernels
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.modules import QuantLinear
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.quantize.ptq import gptq
from qatapult.trainer.quantize.ptq.calibration import hessian_of, spread_blocks, walk_blocks
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Ptq, Quantization

Weights = dict[str, Tensor]
Errors = dict[str, dict[str, float]]


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears, by name."""
    named = model.named_modules()
    return {
        name: layer
        for name, layer in named
        if isinstance(layer, QuantLinear) and layer.weight_scheme is not None
    }


@torch.no_grad()
def rounded(model: nn.Module) -> Weights:
    """Every linear's weight as its grid represents it."""
    return {name: layer.fake_quantized_weight().clone() for name, layer in linears(model).items()}


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, text: Tensor, original: Weights, candidates: dict[str, Weights]
) -> Errors:
    """Relative squared output error of each candidate for each layer, on the inputs that `model` gives it.

    Args:
        model: quantized. text: token ids `[n, block]`. original: full-precision weights.
        candidates: rounded weights by the method's name.
    """
    names = {layer: name for name, layer in linears(model).items()}
    errors: Errors = {}
    latest: list[tuple[Tensor, Tensor]] = []

    def on_input(layer: nn.Module, inputs: Tensor) -> None:
        if not isinstance(layer, QuantLinear) or layer not in names:
            return
        if not latest or latest[0][0] is not inputs:
            scheme = layer.activation_scheme
            seen = inputs if scheme is None else kernels.fake_quantize_dynamic(inputs, scheme)
            latest[:] = [(inputs, hessian_of(seen))]
        name, hessian = names[layer], latest[0][1]
        whole = energy(original[name], hessian)
        errors[name] = {
            method: float(f"{energy(weights[name] - original[name], hessian) / whole:.4g}")
            for method, weights in candidates.items()
        }

    walk_blocks(model, text, on_input)
    return errors


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Mean of `‖W x‖²` over the tokens of which the Hessian is."""
    return float(((weight.float() @ hessian) * weight.float()).sum())


def measure(recipe_name: str, grid: Quantization, blocks: int, held_out_blocks: int) -> dict[str, Errors]:
    """Errors on calibration text and on held-out text, `{text: {layer: {method: error}}}`."""
    recipe = load_recipe(recipe_name, [f"data.evaluation_blocks={held_out_blocks}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(recipe, load_tokenizer(recipe.model))
    model = load_model(recipe.model).to(device)
    prepare(model, grid)
    original = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    calibration = spread_blocks(data.train, blocks).to(device)
    candidates = {"rtn": rounded(model)}
    gptq.quantize(model, calibration, Ptq(), grid)
    candidates["gptq"] = rounded(model)
    texts = {"calibration": calibration, "held_out": data.held_out.to(device)}
    return {text: layer_errors(model, ids, original, candidates) for text, ids in texts.items()}


def rows(format_name: str, text: str, errors: Errors) -> list[str]:
    """A table row for each kind of layer: GPTQ's share of round-to-nearest's error, its median and its largest."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rpartition(".")[2], []).append((error["gptq"] / error["rtn"], name))
    lines = []
    for kind, shares in kinds.items():
        worst, where = max(shares)
        median = statistics.median(share for share, _ in shares)
        below = sum(share < 1 for share, _ in shares)
        lines.append(
            f"| {format_name} | {text} | {kind} | {below} of {len(shares)} | {median:.3f} | {worst:.3f} ({where}) |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m-w4a8")
    parser.add_argument("--formats", nargs="+", default=["W4A8", "W4A16g64"], help="as for ptq.py")
    parser.add_argument("--calibration", type=int, default=64, help="blocks of 512 tokens")
    parser.add_argument("--held-out", type=int, default=16, help="blocks of 512 tokens")
    parser.add_argument("--json", type=Path, help="write every layer's errors here")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    print("| format | text | layers | below round-to-nearest | median share | largest share |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.formats:
        found[name] = measure(options.recipe, grids(name, "minmax"), options.calibration, options.held_out)
        for text, errors in found[name].items():
            print("\n".join(rows(name, text, errors)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    every = [layer for texts in found.values() for errors in texts.values() for layer in errors.values()]
    return 0 if all(layer["gptq"] < layer["rtn"] for layer in every) else 1


if __name__ == "__main__":
    sys.exit(main())
