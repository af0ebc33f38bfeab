"""Post-training quantization: held-out perplexity and seconds of every method.

    python benchmarks/training/ptq.py --formats W4A8 W4A16g64 --methods rtn gptq --calibration 64 16

Uses a GPU where there is one. The recorded figures of llm-compressor (GPTQ, 64 × 512 calibration tokens, the
same model and text, a two-core machine with AVX512) stand beside the measured ones: W4A8 19.99 and W4A16 g64
18.11, 234 s each.

`--dump FOLDER` writes the model and the tokens instead, for `ptq_peer.py`: llm-compressor on exactly these.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qatapult.trainer.data.blocks import TokenizedData, load_data
from qatapult.trainer.evaluate.perplexity import perplexity
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.quantize.ptq.calibration import spread_blocks
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Ptq, Quantization, Recipe, TensorScheme

RANGES = ("minmax", "mse")
RECORDED = {("W4A8", "gptq"): 19.99, ("W4A16g64", "gptq"): 18.11}


def grids(name: str, range_method: str) -> Quantization:
    """`W4A8`, `W16A8`, `W4A16g64`, `W3A16g64a` (a: asymmetric) as the recipe's quantization; 16 is none."""
    weights, _, rest = name.removeprefix("W").partition("A")
    activations, _, group = rest.rstrip("a").partition("g")
    inputs = None if activations == "16" else TensorScheme(bits=float(activations), granularity="token")
    if weights == "16":
        return Quantization(weights=None, activations=inputs)
    scheme = TensorScheme(
        bits=float(weights),
        granularity="group" if group else "channel",
        group_size=int(group) if group else None,
        symmetric=not name.endswith("a"),
        range=range_method,
    )
    return Quantization(weights=scheme, activations=inputs)


def measure(model: PreTrainedModel, data: TokenizedData) -> float:
    return perplexity(model.eval(), data.held_out, data.held_out_documents).value


def quantized(
    recipe: Recipe, data: TokenizedData, grid: Quantization, method: str, blocks: int, device: torch.device
) -> tuple[PreTrainedModel, float]:
    """The quantized model, and the seconds that the method took."""
    model = load_model(recipe.model).to(device)
    prepare(model, grid)
    calibration = spread_blocks(data.train, blocks).to(device)
    started = time.perf_counter()
    if method != "rtn":
        module = importlib.import_module(f"qatapult.trainer.quantize.ptq.{method}")
        module.quantize(model, calibration, Ptq(), grid)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model, time.perf_counter() - started


def dump(recipe: Recipe, data: TokenizedData, blocks: int, folder: Path) -> None:
    """Write the full-precision model, the calibration blocks and the held-out blocks for a peer."""
    load_model(recipe.model).save_pretrained(folder / "model")
    load_tokenizer(recipe.model).save_pretrained(folder / "model")
    tokens = {"calibration": spread_blocks(data.train, blocks).contiguous(), "held_out": data.held_out}
    save_file(tokens, str(folder / "tokens.safetensors"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m-w4a8")
    parser.add_argument("--formats", nargs="+", default=["W4A8", "W4A16g64"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--ranges", nargs="+", default=list(RANGES), choices=RANGES)
    parser.add_argument("--calibration", nargs="+", type=int, default=[64], help="blocks of 512 tokens")
    parser.add_argument("--evaluation-blocks", type=int, default=16)
    parser.add_argument("--dump", type=Path, help="write model and tokens for ptq_peer.py, and end")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, [f"data.evaluation_blocks={options.evaluation_blocks}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(recipe, load_tokenizer(recipe.model))
    if options.dump:
        dump(recipe, data, options.calibration[0], options.dump)
        return
    full = measure(load_model(recipe.model).to(device), data)
    print(f"full precision {full:.3f} on {data.held_out.numel():,} held-out tokens, {device}", flush=True)
    print(
        "| format | method | range | calibration | perplexity | × full precision | seconds | recorded GPTQ |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.formats:
        for method in options.methods:
            for range_method in options.ranges:
                for blocks in options.calibration[: 1 if method == "rtn" else None]:
                    grid = grids(name, range_method)
                    model, seconds = quantized(recipe, data, grid, method, blocks, device)
                    value, recorded = measure(model, data), RECORDED.get((name, method))
                    beside = f"{recorded} (ours {value / recorded - 1:+.1%})" if recorded else "–"
                    print(
                        f"| {name} | {method} | {range_method} | {blocks} × {recipe.data.block_size} "
                        f"| {value:.3f} | {value / full:.3f} | {seconds:.1f} | {beside} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
