"""llm-compressor's GPTQ on the model, the calibration blocks and the held-out blocks that `ptq.py --dump` wrote.

    python -m venv peer && peer/bin/pip install torch llmcompressor     # it wants an older transformers than we do
    python benchmarks/training/ptq.py --dump dump
    peer/bin/python benchmarks/training/ptq_peer.py dump --formats W4A8 W4A16g64

Imports nothing of Qatapult, so that it runs in an environment of its own; prints rows of the same table.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

_BATCH = 4


def modifier(name: str) -> Any:
    """GPTQ for `W4A8`, `W4A16g64`, …, with llm-compressor's own defaults otherwise."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights, _, rest = name.removeprefix("W").partition("A")
    activations, _, group = rest.partition("g")
    grid = QuantizationArgs(
        num_bits=int(weights),
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=int(group) if group else None,
    )
    inputs = None
    if activations != "16":
        inputs = QuantizationArgs(num_bits=int(activations), symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid, input_activations=inputs)
    return GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])


def quantize(folder: Path, name: str, calibration: Tensor) -> tuple[PreTrainedModel, float]:
    """The model after GPTQ, and the seconds that it took."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=str(folder),
        dataset=Dataset.from_dict(rows),
        recipe=[modifier(name)],
        num_calibration_samples=len(calibration),
        max_seq_length=calibration.shape[1],
        shuffle_calibration_samples=False,
    )
    return model, time.perf_counter() - started


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Tensor) -> float:
    """exp of the mean next-token loss over blocks `[n, S]`, as `qatapult.trainer.evaluate.perplexity` has it."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for part in blocks.split(_BATCH):
        ids = part.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, help="what `ptq.py --dump` wrote")
    parser.add_argument("--formats", nargs="+", default=["W4A8", "W4A16g64"])
    options = parser.parse_args()
    tokens = load_file(options.dump / "tokens.safetensors")
    calibration, held_out = tokens["calibration"], tokens["held_out"]
    plain = AutoModelForCausalLM.from_pretrained(options.dump / "model", dtype=torch.float32)
    full = perplexity(plain, held_out)
    print(f"full precision {full:.3f} on {held_out.numel():,} held-out tokens", flush=True)
    for name in options.formats:
        model, seconds = quantize(options.dump / "model", name, calibration)
        value = perplexity(model, held_out)
        print(
            f"| {name} | llm-compressor's gptq | minmax | {len(calibration)} × {calibration.shape[1]} "
            f"| {value:.3f} | {value / full:.3f} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
