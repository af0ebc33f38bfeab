"""Products on packed 4-bit weights beside those of gemlite and torchao, on a GPU.

    python benchmarks/inference/gemm_peers.py [--shapes 4096x4096,11008x4096] [--tokens 1,16,256,4096] [--json FILE]

All in one run, each captured in a CUDA graph over copies of its weight that together exceed the second-level cache
twice, on fresh random data. W4A8 of both sides includes the dynamic quantization of activations per token. gemlite is
`A8W4_HQQ_INT_dynamic` on int8 and `A16W4_HQQ_INT`; it brings block sizes measured for this card and tunes what it has
none for. torchao is the kernel behind its `Int4WeightOnlyConfig`, `_weight_int4pack_mm`, with bf16 activations. A peer
that fails is shown with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gemm import TOKENS, Layer, copies_for
from timing import graph_time

from qatapult.kernels import quantize_activations
from qatapult.kernels.int_gemm.configs import Problem, choose_config

Product = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer's weight `[n, k]`, a scale for `group` features (0: a channel), and copies that fill the cache twice."""

    n: int
    k: int
    group: int
    copies: int

    def random(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes 0 to 15 as uint8 `[n, k]` and scales bf16 `[n · groups, 1]`; the zero point is 8."""
        groups = self.k // self.group if self.group else 1
        codes = torch.randint(0, 16, (self.n, self.k), dtype=torch.uint8, device="cuda")
        return codes, (torch.rand(self.n * groups, 1, device="cuda") * 0.01 + 0.001).bfloat16()


def ours(shape: Shape, m: int) -> Product:
    """W4A8, per-token quantization included."""
    layer = Layer(shape.n, shape.k, 4, shape.group, shape.copies)
    major, minor = torch.cuda.get_device_capability()
    vector = m == 1 and shape.k % layer.layout.unit == 0
    problem = Problem(m, shape.n, shape.k, 4, shape.group, 8)
    config = choose_config(problem, 10 * major + minor, layer.layout.unit, vector)

    def run(x: torch.Tensor, copy: int) -> torch.Tensor:
        codes, scale = quantize_activations(x, TOKENS)
        return layer.product(codes, scale, config, copy)

    return run


def plain(shape: Shape, m: int) -> Product:
    """cuBLAS in bf16."""
    copies = copies_for(2 * shape.n * shape.k)
    weights = [
        torch.randn(shape.n, shape.k, device="cuda").bfloat16() for _ in range(min(copies, shape.copies))
    ]
    return lambda x, copy: x @ weights[copy % len(weights)].t()


def gemlite(make: str, shape: Shape, m: int, **settings: Any) -> Product:
    """One of gemlite's processors over the same kind of weight."""
    from gemlite import helper

    layers = []
    for _ in range(shape.copies):
        codes, scale = shape.random()
        processor = getattr(helper, make)(device="cuda:0", dtype=torch.bfloat16, **settings)
        layers.append(processor.from_weights(codes, scale, torch.full_like(scale, 8)))
    return lambda x, copy: layers[copy](x)


def torchao(shape: Shape, m: int) -> Product:
    """Tiles of 4-bit codes with bf16 activations; groups of 128 stand for channels, which it does not have."""
    group = shape.group or 128
    scales = torch.rand(shape.k // group, shape.n, 2, device="cuda").bfloat16() * 0.01
    weights = []
    for _ in range(shape.copies):
        nibbles = torch.randint(0, 256, (shape.n, shape.k // 2), dtype=torch.uint8, device="cuda")
        weights.append(torch.ops.aten._convert_weight_to_int4pack(nibbles, 8))
    return lambda x, copy: torch.ops.aten._weight_int4pack_mm(x, weights[copy], group, scales)


CANDIDATES: dict[str, Callable[[Shape, int], Product]] = {
    "bf16": plain,
    "ours W4A8": ours,
    "gemlite W4A8": partial(gemlite, "A8W4_HQQ_INT_dynamic", fp8=torch.int8),
    "gemlite W4A16": partial(gemlite, "A16W4_HQQ_INT"),
    "torchao W4A16": torchao,
}


def measure(shape: Shape, m: int) -> dict[str, float | str]:
    """Seconds of each candidate, or why there are none."""
    x = torch.randn(m, shape.k, device="cuda").bfloat16()
    found: dict[str, float | str] = {}
    for name, build in CANDIDATES.items():
        try:
            run = build(shape, m)
            run(x, 0)
            found[name] = graph_time(partial(run, x), range(shape.copies))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:160]
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Microseconds, and how many times as long as ours each takes."""
    names = list(CANDIDATES)
    lines = [
        "| N × K | group | M | "
        + " | ".join(f"{name} µs" for name in names)
        + " | "
        + " | ".join(f"{name} ÷ ours" for name in names if not name.startswith("ours"))
        + " |"
    ]
    lines.append("|---|---|" + "---:|" * (2 * len(names)))
    for row in rows:
        times = row["seconds"]
        own = times["ours W4A8"]
        cells = [
            f"{t * 1e6:.1f}" if isinstance(t, float) else "failed" for t in (times[name] for name in names)
        ]
        for name in names:
            if not name.startswith("ours"):
                whole = isinstance(times[name], float) and isinstance(own, float)
                cells.append(f"{times[name] / own:.2f}" if whole else "–")
        lines.append(
            f"| {row['n']} × {row['k']} | {row['group'] or 'channel'} | {row['m']} | "
            + " | ".join(cells)
            + " |"
        )
    failures = {f"{n}: {t}" for row in rows for n, t in row["seconds"].items() if isinstance(t, str)}
    return "\n".join([*lines, "", *sorted(failures)]) + "\n"


def main() -> None:
    """Measure and print the table, which is on disk after every line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x14336")
    parser.add_argument("--groups", default="0,128", help="0 is one scale a channel")
    parser.add_argument("--tokens", default="1,16,64,256,4096")
    parser.add_argument("--json", type=Path, help="file for the figures; the table lies beside it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    rows: list[dict[str, Any]] = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for text in options.shapes.split(","):
        n, k = map(int, text.split("x"))
        for group in map(int, options.groups.split(",")):
            shape = Shape(n, k, group, copies_for(n * k // 2))
            for m in map(int, options.tokens.split(",")):
                rows.append({"n": n, "k": k, "group": group, "m": m, "seconds": measure(shape, m)})
                print(rows[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
