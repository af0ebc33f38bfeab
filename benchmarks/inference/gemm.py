"""Products on packed weights on a GPU against bf16, int8 and the machine's limits (CPU: `gemm_cpu.py`).

    python benchmarks/inference/gemm.py
    python benchmarks/inference/gemm.py --sweep --table kernels/int_gemm/tables/sm_90.json   # a GPU: tune first

On a GPU each operation is captured in a CUDA graph over copies of its weight that together exceed the
second-level cache twice, with fresh random data. The limit is the larger of two times: moving weights,
activations and results at the measured copy bandwidth, and the operations at the measured rate of the
vendor's int8 GEMM at 8192³ (half of it for 16-bit activations).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import copy_bandwidth, graph_time

from qatapult.kernels import Scheme, quantize_activations
from qatapult.kernels.int_gemm.configs import (
    Config,
    Problem,
    VectorConfig,
    candidates,
    default_config,
    write_table,
)

TOKENS = Scheme(granularity="token")
#: Layers of LLaMA-2-7B and Llama-3-8B as [N, K], and one matrix of more than 200 MB at 4 bits.
GPU_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336), (36864, 12288))
GPU_TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass
class Row:
    """One line of the table; times in seconds."""

    n: int
    k: int
    m: int
    group: int
    ours: float
    with_quantization: float
    bf16: float
    limit: float
    int8: float | None
    config: dict[str, int] | None


class Layer:
    """Copies of a random packed weight and activations of one shape on the GPU."""

    def __init__(self, n: int, k: int, bits: int, group: int, copies: int) -> None:
        from qatapult.kernels.int_gemm.tiles import TileLayout, slice_width_of, to_tiles

        self.scheme = Scheme(bits=bits, granularity="group" if group else "channel", group_size=group or None)
        self.layout = TileLayout(bits, slice_width_of(self.scheme) or 64)
        top = 1 << bits - 1
        self.codes = torch.randint(-top, top, (n, k), dtype=torch.int8, device="cuda")
        self.tiles = [to_tiles(self.codes, self.layout)]
        # Other copies hold other random bits: only memory traffic tells them apart.
        self.tiles += [torch.randint_like(self.tiles[0], 0, 256) for _ in range(copies - 1)]
        groups = k // group if group else 1
        self.scale = torch.rand(groups, n, device="cuda").t() * 0.01 + 0.001

    def product(
        self, x: torch.Tensor, token_scale: torch.Tensor | None, config: Config, copy: int
    ) -> torch.Tensor:
        from qatapult.kernels.int_gemm.cuda import packed_product_triton

        return packed_product_triton(
            x,
            token_scale,
            self.tiles[copy],
            self.scale,
            None,
            None,
            self.layout,
            False,
            torch.bfloat16,
            config,
        )

    def expected(self, x: torch.Tensor, token_scale: torch.Tensor | None) -> torch.Tensor:
        weight = self.codes.float() * self.scale.repeat_interleave(x.shape[1] // self.scale.shape[1], 1)
        product = x.double() @ weight.double().t()
        return (product if token_scale is None else product * token_scale).float()


def inputs(m: int, k: int, activation_bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if activation_bits == 16:
        return torch.randn(m, k, device="cuda").bfloat16(), None
    return torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda"), torch.rand(
        m, 1, device="cuda"
    ) * 0.1


def compile_config(job: tuple[int, int, int, int, int, Config]) -> str | None:
    """Compile one configuration into Triton's cache (in a worker); the message if it does not compile."""
    m, k, bits, group, activation_bits, config = job
    m = 1 if isinstance(config, VectorConfig) else m
    layer = Layer(256, k, bits, group, 1)
    try:
        layer.product(*inputs(m, k, activation_bits), config, 0)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {error}"[:300]
    return None


def tune(options: argparse.Namespace) -> list[tuple[Problem, Config]]:
    """Measure all candidates of all shapes; the fastest right one of each problem."""
    problems = [
        Problem(m, n, k, options.bits, group, options.activation_bits)
        for (n, k), m, group in itertools.product(options.shapes, options.tokens, options.groups)
        if k % max(group, 1) == 0
    ]
    unit = 64 * 8 // options.bits
    jobs = {
        (256, 4096, p.bits, p.group, p.activation_bits, config)
        for p in problems
        for config in (default_config(p, 90, unit), *candidates(p, unit))
    }
    start = time.monotonic()
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        failures = [f for f in pool.imap_unordered(compile_config, sorted(jobs, key=str), chunksize=2) if f]
    print(f"{len(jobs)} configurations compiled in {time.monotonic() - start:.0f} s, {len(failures)} failed")
    for failure in failures:
        print("  failed:", failure)
    best = []
    for (n, k, group), same in itertools.groupby(
        problems_by_layer(problems), key=lambda p: (p.n, p.k, p.group)
    ):
        layer = Layer(n, k, options.bits, group, copies_for(n * k * options.bits // 8))
        for problem in same:
            if time.monotonic() - start > options.minutes * 60:
                print(f"out of time before M={problem.m} of {n} × {k}")
                return best
            found = measure(problem, layer, unit, failures, options.table.with_suffix(".times.jsonl"))
            if found is not None:
                best.append((problem, found[0]))
    return best


def problems_by_layer(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda p: (p.n * p.k, p.n, p.group, p.m))


def measure(
    problem: Problem, layer: Layer, unit: int, failures: list[str], log: Path
) -> tuple[Config, float] | None:
    """The fastest configuration whose result is right."""
    x, token_scale = inputs(problem.m, problem.k, problem.activation_bits)
    expected = layer.expected(x, token_scale)
    best: tuple[Config, float] | None = None
    for config in sorted({default_config(problem, 90, unit), *candidates(problem, unit)}, key=str):
        if any(f.startswith(str(config)) for f in failures):
            continue
        try:
            result = layer.product(x, token_scale, config, 0).float()
        except Exception as error:
            print(f"  {problem} {config}: {type(error).__name__}: {str(error)[:120]}")
            continue
        worst = float((result - expected).abs().max() / expected.abs().max())
        if not worst < 6e-3:
            print(f"  WRONG by {worst:.2e}: {problem} {config}")
            continue
        seconds = graph_time(
            partial(layer.product, x, token_scale, config), range(len(layer.tiles)), budget_ms=4
        )
        with log.open("a") as file:
            line = {"problem": asdict(problem), "config": asdict(config), "seconds": seconds}
            file.write(json.dumps(line) + "\n")
        if best is None or seconds < best[1]:
            best = (config, seconds)
    return best


def copies_for(size: int) -> int:
    """Copies of a buffer that fill the second-level cache twice."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-2 * cache // size) + 1))


def gpu_rows(options: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Measure every shape with the configurations that `packed_linear` chooses."""
    a, b = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda") for _ in range(2))
    limits = {
        "copy bandwidth, bytes/s": copy_bandwidth("cuda"),
        "int8 GEMM 8192³, operations/s": 2
        * 8192**3
        / graph_time(lambda w: torch._int_mm(a, w.t()), [b], budget_ms=20),
    }
    rows = []
    for n, k in options.shapes:
        plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies_for(2 * n * k))]
        whole = [
            torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
            for _ in range(copies_for(n * k))
        ]
        for group in options.groups:
            layer = Layer(n, k, options.bits, group, copies_for(n * k * options.bits // 8))
            rows += [
                gpu_row(layer, plain, whole, m, options.activation_bits, *limits.values())
                for m in options.tokens
            ]
    return rows, limits


def gpu_row(
    layer: Layer,
    plain: list[torch.Tensor],
    whole: list[torch.Tensor],
    m: int,
    activation_bits: int,
    bandwidth: float,
    rate: float,
) -> Row:
    """One shape and M: ours without and with the quantization of activations, bf16, int8, and the limit."""
    from qatapult.kernels.int_gemm.configs import choose_config

    n, k = plain[0].shape
    group = 0 if layer.scale.shape[1] == 1 else k // layer.scale.shape[1]
    major, minor = torch.cuda.get_device_capability()
    problem = Problem(m, n, k, layer.layout.bits, group, activation_bits)
    vector = m == 1 and activation_bits == 8 and k % layer.layout.unit == 0
    config = choose_config(problem, 10 * major + minor, layer.layout.unit, vector)
    x, token_scale = inputs(m, k, activation_bits)
    tokens = torch.randn(m, k, device="cuda").bfloat16()

    def with_quantization(copy: int) -> torch.Tensor:
        codes, scale = quantize_activations(tokens, TOKENS)
        return layer.product(codes, scale, config, copy)

    copies = range(len(layer.tiles))
    ours = graph_time(partial(layer.product, x, token_scale, config), copies)
    both = ours if token_scale is None else graph_time(with_quantization, copies)
    bf16 = graph_time(lambda w: tokens @ w.t(), plain)
    int8 = None
    if m > 16 and token_scale is not None:
        int8 = graph_time(lambda w: torch._int_mm(x, w.t()), whole)
    moved = n * k * layer.layout.bits / 8 + layer.scale.numel() * 4 + m * k * x.element_size() + 2 * m * n
    operations = 2 * m * n * k * (1 if token_scale is not None else 2)
    limit = max(moved / bandwidth, operations / rate)
    return Row(n, k, m, group, ours, both, bf16, limit, int8, asdict(config))


def describe(config: dict[str, int] | None) -> str:
    """A configuration in a few characters."""
    if config is None:
        return ""
    if "units" in config:
        return "vector {rows}×{units} (w{warps})".format(**config)
    return "{block_n}×{block_m}, {split} (w{warps} s{stages})".format(**config)


def table(rows: list[Row]) -> str:
    """Markdown; times in microseconds, ratios against bf16 and the limit."""
    lines = [
        "| N × K | group | M | ours µs | with quantization µs | bf16 µs | bf16 / ours | int8 GEMM µs "
        "| of the limit | block, split |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        chosen = describe(r.config)
        int8 = "" if r.int8 is None else f"{r.int8 * 1e6:.1f}"
        lines.append(
            f"| {r.n} × {r.k} | {r.group or 'channel'} | {r.m} "
            f"| {r.ours * 1e6:.1f} | {r.with_quantization * 1e6:.1f} "
            f"| {r.bf16 * 1e6:.1f} | {r.bf16 / r.ours:.2f} | {int8} | {r.limit / r.ours:.0%} | {chosen} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4, choices=(8, 4, 3, 2, 1))
    parser.add_argument("--activation-bits", type=int, default=8, choices=(8, 16))
    parser.add_argument("--groups", default="0,128", help="0 is one scale a channel")
    parser.add_argument("--tokens", default=",".join(map(str, GPU_TOKENS)))
    parser.add_argument("--shapes", help="NxK,NxK,…")
    parser.add_argument("--sweep", action="store_true", help="measure all candidate configurations first")
    parser.add_argument("--minutes", type=float, default=5.0, help="when the sweep stops")
    parser.add_argument("--table", type=Path, help="file that the sweep writes and the products then use")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="four shapes, six counts of tokens: some three minutes with --sweep",
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU; use gemm_cpu.py")
    if options.quick:
        options.tokens = "1,16,64,256,1024,4096"
        options.shapes = options.shapes or "4096x4096,11008x4096,4096x14336,36864x12288"
    options.groups = [int(g) for g in options.groups.split(",")]
    options.tokens = [int(m) for m in options.tokens.split(",")]
    shapes = GPU_SHAPES
    if options.shapes:
        shapes = tuple(tuple(map(int, shape.split("x"))) for shape in options.shapes.split(","))
    options.shapes = shapes
    if options.sweep and options.table is None:
        parser.error("--sweep needs --table FILE")
    return options


def main() -> None:
    options = parse()
    if options.sweep:
        from qatapult.kernels.int_gemm.configs import pin_table

        write_table(options.table, tune(options))
        pin_table(options.table)
    rows, limits = gpu_rows(options)
    device = torch.cuda.get_device_name()
    print(f"W{options.bits}A{options.activation_bits}, {device}, torch {torch.__version__}")
    print(", ".join(f"{name}: {value:.3e}" for name, value in limits.items()))
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"device": device, "limits": limits, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
