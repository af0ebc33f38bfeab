"""Products on packed weights on the CPU against fp32, bf16, int8, torchao's int4 kernels, and the machine's limits.

    python benchmarks/inference/gemm_cpu.py [--plot docs/images/gemm_cpu.png] [--json figures.json]

Every operation goes round copies of its weight that together exceed the last-level cache, so that weights come from
memory, as they do in decoding; rounds are interleaved and medians count. Ours quantizes bf16 tokens, multiplies and
scales; `_int_mm` is the bare product of int8 codes. The limit is the larger of two times: the packed weight, the tokens
and the result at the measured copy bandwidth, and the operations at the best rate that `_int_mm` reached here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from timing import copy_bandwidth, cpu_times

from qatapult.kernels import Scheme, choose_range, pack, packed_linear, prepare_weight, quantize
from qatapult.trainer.measure import device_name

TOKENS = Scheme(granularity="token")
CHANNEL, GROUP = Scheme(bits=4), Scheme(bits=4, granularity="group", group_size=64)
#: Layers of SmolLM2-135M and one of LLaMA-2-7B, as [N, K].
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
COUNTS = (1, 4, 16, 64, 256)
#: Bytes that the copies of a weight take together.
BEYOND_CACHE = 64 << 20
#: torchao's dynamic 4-bit product has no optimised kernel for x86: at more tokens it takes seconds.
MOST_TOKENS_OF_DYNAMIC = 1

Operation = Callable[[], object]


@dataclass
class Row:
    """One shape and number of tokens; `times` in seconds by operation."""

    n: int
    k: int
    m: int
    times: dict[str, float]
    limit: float


def int8_rate() -> float:
    """Operations a second of `_int_mm` on a large square."""
    a, b = (torch.randint(-127, 128, (2048, 2048), dtype=torch.int8) for _ in range(2))
    return 2 * 2048**3 / cpu_times({"mm": lambda: torch._int_mm(a, b.t())})["mm"]


def around(make: Callable[[], Operation], size: int) -> Operation:
    """An operation that goes round copies of itself, each with a weight of `size` bytes of its own."""
    copies: Iterator[Operation] = itertools.cycle(
        [make() for _ in range(max(1, min(128, BEYOND_CACHE // size)))]
    )
    return lambda: next(copies)()


def ours(x: Tensor, weight: Tensor, scheme: Scheme) -> Callable[[], Operation]:
    """Makers of W4A8 products of one weight, each on memory of its own."""
    scale, _ = choose_range(weight, scheme)
    packed = pack(quantize(weight, scale, None, scheme), scheme)

    def make() -> Operation:
        prepared = prepare_weight(
            packed, scale, scheme=scheme, features=weight.shape[1], activation_scheme=TOKENS
        )
        return lambda: packed_linear(x, prepared, activation_scheme=TOKENS)

    return make


def torchao_weight_only(x: Tensor, n: int, k: int) -> Callable[[], Operation]:
    """bf16 tokens with int4 weights in groups of 64."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales = torch.rand(k // 64, n, 2).bfloat16()

    def make() -> Operation:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales)

    return make


def torchao_dynamic(x: Tensor, n: int, k: int) -> Callable[[], Operation]:
    """Tokens quantized to int8, int4 weights in groups of 32."""
    codes, scales = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, k // 32).bfloat16()

    def make() -> Operation:
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(codes, scales, None, 32, k, n)
        return lambda: torch.ops.aten._dyn_quant_matmul_4bit(x, packed, 32, k, n)

    return make


def operations(n: int, k: int, m: int) -> dict[str, Operation]:
    """Everything that is compared, by name."""
    weight, x = torch.randn(n, k), torch.randn(m, k)
    tokens, codes = x.bfloat16(), torch.randint(-127, 128, (m, k), dtype=torch.int8)

    def bf16() -> Operation:
        own = weight.bfloat16()
        return lambda: tokens @ own.t()

    def fp32() -> Operation:
        own = weight.clone()
        return lambda: x @ own.t()

    def int8() -> Operation:
        own = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return lambda: torch._int_mm(codes, own.t())

    made = {
        "W4A8": around(ours(tokens, weight, CHANNEL), n * k // 2),
        "W4A8 g64": around(ours(tokens, weight, GROUP), n * k // 2),
        "int8 `_int_mm`": around(int8, n * k),
        "bf16": around(bf16, 2 * n * k),
        "fp32": around(fp32, 4 * n * k),
        "torchao int4 g64": around(torchao_weight_only(tokens, n, k), n * k // 2),
    }
    if m <= MOST_TOKENS_OF_DYNAMIC:
        made["torchao dynamic g32"] = around(torchao_dynamic(tokens.float(), n, k), n * k // 2)
    return made


def measure(bandwidth: float, rate: float) -> list[Row]:
    rows = []
    for (n, k), m in itertools.product(SHAPES, COUNTS):
        times = cpu_times(operations(n, k, m), rounds=5, least_seconds=0.01)
        limit = max((n * k / 2 + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / rate)
        rows.append(Row(n, k, m, times, limit))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, microseconds."""
    names = list(rows[0].times)
    lines = [
        f"| N × K | M | {' | '.join(names)} | bf16 / W4A8 | limit | of the limit |",
        "|---|" + "---:|" * (len(names) + 4),
    ]
    for row in rows:
        cells = [f"{row.times[name] * 1e6:.0f}" if name in row.times else "" for name in names]
        ours = row.times["W4A8"]
        lines.append(
            f"| {row.n} × {row.k} | {row.m} | {' | '.join(cells)} | {row.times['bf16'] / ours:.2f} "
            f"| {row.limit * 1e6:.0f} | {row.limit / ours:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Operations a second over tokens, a panel a shape, with the limit."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(SHAPES), sharey=True)
    for axes, (n, k) in zip(panels, SHAPES, strict=True):
        own = [row for row in rows if (row.n, row.k) == (n, k)]
        for name in ("W4A8", "W4A8 g64", "int8 `_int_mm`", "bf16", "fp32", "torchao int4 g64"):
            rates = [2e-9 * row.m * n * k / row.times[name] for row in own]
            axes.plot([row.m for row in own], rates, marker="o", markersize=3, label=name.replace("`", ""))
        limits = [2e-9 * row.m * n * k / row.limit for row in own]
        axes.plot([row.m for row in own], limits, "k--", linewidth=1, label="limit")
        axes.set(title=f"{n} × {k}", xlabel="tokens", xscale="log", yscale="log")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("10⁹ operations / s")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    bandwidth, rate = copy_bandwidth("cpu", 0.25), int8_rate()
    rows = measure(bandwidth, rate)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}; microseconds")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, int8 {rate / 1e9:.0f} × 10⁹ operations/s\n")
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        figures = {"bandwidth": bandwidth, "int8": rate, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
