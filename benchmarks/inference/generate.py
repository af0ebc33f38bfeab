"""Tokens per second of prefill and decoding: packed integers against plain transformers and llama.cpp.

    python benchmarks/inference/generate.py [--recipe smollm2-135m-w4a8] [--prompt 512] [--tokens 64] [--repeats 5]
    python benchmarks/inference/generate.py --set model.source=random:llama-2-7b --no-peaks    # a GPU

Every candidate continues the same random tokens, greedily, on the same machine. Rounds are interleaved, so
that whatever else the machine does falls on all alike; the table shows medians, the ratio to plain bf16
transformers, and each candidate's own peak memory in a process of its own. llama.cpp runs Q4_0 of the same model.
Weights are rounded to nearest: their values do not matter for speed. On a GPU a token is also decoded by a CUDA graph
over a static cache, for plain and packed alike: without one, small models wait for Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from qatapult.trainer.loop.engine import multiplies_bf16
from qatapult.trainer.measure import device_name, peak_memory
from qatapult.trainer.models import load_config, load_model, load_tokenizer
from qatapult.trainer.quantize.convert import convert
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.quantize.serve import cast, serve
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Override, Quantization, Recipe, TensorScheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = "transformers bf16"


@dataclass(frozen=True)
class Speed:
    """Seconds of one round: of the prompt, and of the tokens after it."""

    prefill: float
    decode: float


Candidate = Callable[[list[int], int], Speed]


def transformers_candidate(model: PreTrainedModel) -> Candidate:
    """Greedy decoding with a KV cache, without `generate`'s overhead around it."""

    @torch.inference_mode()
    def run(prompt: list[int], tokens: int) -> Speed:
        cache = DynamicCache()
        ids = torch.tensor([prompt], device=DEVICE)
        start = _now()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        following = logits[:, -1:].argmax(-1)
        middle = _now()
        for _ in range(tokens):
            logits = model(following, past_key_values=cache, use_cache=True).logits
            following = logits[:, -1:].argmax(-1)
        return Speed(middle - start, _now() - middle)

    return run


def graph_candidate(model: PreTrainedModel) -> Candidate:
    """The same, with each token decoded by one CUDA graph over a static cache."""
    following = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    captured: list[tuple[StaticCache, torch.cuda.CUDAGraph]] = []

    def step(cache: StaticCache) -> None:
        logits = model(following, past_key_values=cache, use_cache=True).logits
        following.copy_(logits[:, -1:].argmax(-1))

    def capture(length: int) -> None:
        cache = StaticCache(config=model.config, max_cache_len=length)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and buffers allocated before anything is recorded
                step(cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(cache)
        captured.append((cache, graph))

    @torch.inference_mode()
    def run(prompt: list[int], tokens: int) -> Speed:
        if not captured:
            capture(len(prompt) + tokens + 1)
        cache, graph = captured[0]
        cache.reset()
        ids = torch.tensor([prompt], device=DEVICE)
        start = _now()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        following.copy_(logits[:, -1:].argmax(-1))
        middle = _now()
        for _ in range(tokens):
            graph.replay()
        return Speed(middle - start, _now() - middle)

    return run


def load(recipe: Recipe, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The recipe's model on the device; random weights are drawn there, which takes minutes on a processor."""
    if recipe.model.source.startswith("random:"):
        with DEVICE:
            return load_model(recipe.model, dtype)
    return load_model(recipe.model, dtype).to(DEVICE)


def packed(
    recipe: Recipe, quantization: Quantization, dtype: torch.dtype, served: bool = True
) -> PreTrainedModel:
    """The packed model between products in `dtype`, as it is served or module by module as transformers has it."""
    model = load(recipe)
    prepare(model, quantization)
    converted = convert(model, in_place=True)
    assert isinstance(converted, PreTrainedModel)
    converted = cast(converted, dtype)
    return serve(converted) if served else converted


def with_head(recipe: Recipe) -> Quantization:
    """The recipe's grids, and the output head at 8 bits, which the recipe leaves in full precision."""
    head = Override(match="lm_head", weights=TensorScheme(bits=8))
    return recipe.quantization.model_copy(update={"skip": (), "overrides": (head,)})


def llama_cpp(recipe: Recipe) -> Candidate:
    """llama.cpp on Q4_0, by the timings that its server reports."""
    import xllamacpp

    from qatapult.trainer.export import gguf
    from qatapult.trainer.export.trained import TrainedModel

    model = load_model(recipe.model)
    prepare(model, Quantization.model_validate({"deployment": "gguf-q4_0"}))
    folder = Path(tempfile.mkdtemp(prefix="qatapult-benchmark-")) / "gguf"
    gguf.export(TrainedModel.in_memory(model), load_tokenizer(recipe.model), folder)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / gguf.FILE)
    parameters.n_ctx = 4096
    parameters.n_parallel = 1
    parameters.fit_params = False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = torch.get_num_threads()
    parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def run(prompt: list[int], tokens: int) -> Speed:
        reply = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": tokens + 1,
                "temperature": 0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        timings = reply["timings"]
        return Speed(
            timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000 * tokens / timings["predicted_n"]
        )

    return run


CANDIDATES: dict[str, Callable[[Recipe], Candidate]] = {
    REFERENCE: lambda r: transformers_candidate(load(r, torch.bfloat16)),
    "transformers fp32": lambda r: transformers_candidate(load(r)),
    "packed bf16": lambda r: transformers_candidate(packed(r, r.quantization, torch.bfloat16)),
    "packed fp32": lambda r: transformers_candidate(packed(r, r.quantization, torch.float32)),
    "packed bf16, head W8A8": lambda r: transformers_candidate(packed(r, with_head(r), torch.bfloat16)),
    "llama.cpp Q4_0": llama_cpp,
}
if DEVICE.type == "cuda":
    CANDIDATES |= {
        "bf16, CUDA graph": lambda r: graph_candidate(load(r, torch.bfloat16)),
        "packed bf16, CUDA graph": lambda r: graph_candidate(packed(r, r.quantization, torch.bfloat16)),
    }
else:
    modules = "packed bf16, modules"
    CANDIDATES[modules] = lambda r: transformers_candidate(packed(r, r.quantization, torch.bfloat16, False))


def peak_of(name: str, arguments: argparse.Namespace) -> int:
    """Peak bytes of a candidate in a process of its own, after loading, while it runs once."""
    command = [sys.executable, __file__, "--only", name, "--recipe", arguments.recipe]
    command += ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens), "--set", *arguments.set]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


def measure(arguments: argparse.Namespace, recipe: Recipe) -> dict[str, list[Speed]]:
    """Interleaved rounds; the first, in which kernels are compiled and caches fill, is not counted."""
    vocabulary = load_config(recipe.model).vocab_size
    names = [name for name in CANDIDATES if name not in arguments.without]
    candidates = {name: CANDIDATES[name](recipe) for name in names}
    results: dict[str, list[Speed]] = {name: [] for name in names}
    for number in range(arguments.repeats + 1):
        prompt = torch.randint(vocabulary, (arguments.prompt,), generator=_seeded(number)).tolist()
        for name, run in candidates.items():
            speed = run(prompt, arguments.tokens)
            if number:
                results[name].append(speed)
    return results


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m-w4a8")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", action="append", default=[], choices=list(CANDIDATES))
    parser.add_argument(
        "--no-peaks",
        dest="peaks",
        action="store_false",
        help="no peak memory, which needs another process for each candidate",
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.only:
        run = CANDIDATES[arguments.only](recipe)
        run(list(range(10, 10 + arguments.prompt)), arguments.tokens)
        print(json.dumps({"peak": peak_memory(DEVICE)}))
        return
    results = measure(arguments, recipe)
    bf16 = "has" if multiplies_bf16(DEVICE) else "has no"
    print(
        f"{recipe.name}: prompt {arguments.prompt}, then {arguments.tokens} tokens, median of {arguments.repeats}"
    )
    print(f"{device_name(DEVICE)}; the processor {bf16} instructions for bf16 products\n")
    titles = ["prefill tok/s", "× bf16", "decode tok/s", "× bf16", "peak memory" if arguments.peaks else ""]
    print(
        " " * 24
        + "".join(f"{title:>{width}}" for title, width in zip(titles, (14, 8, 14, 8, 14), strict=True))
    )
    reference = results[REFERENCE]
    for name, speeds in results.items():
        prefill, decode = _median(speeds, "prefill"), _median(speeds, "decode")
        ratios = [_median(reference, part) / _median(speeds, part) for part in ("prefill", "decode")]
        peak = f"{peak_of(name, arguments) / 1e9:>11.2f} GB" if arguments.peaks else ""
        print(
            f"{name:<24}{arguments.prompt / prefill:>14.1f}{ratios[0]:>8.2f}{arguments.tokens / decode:>14.1f}"
            f"{ratios[1]:>8.2f}{peak}",
            flush=True,
        )


def _median(speeds: list[Speed], part: str) -> float:
    return statistics.median(getattr(speed, part) for speed in speeds)


def _seeded(number: int) -> Any:
    return torch.Generator().manual_seed(number)


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
