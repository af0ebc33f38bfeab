"""The linear layer of quantization-aware training: integer forward against fake-quantized and plain ones.

    python benchmarks/kernels/quantized_linear.py [--shapes NxK,…] [--tokens 1024]

Forward alone and forward with backward, W4A8 per channel and per group, on the CPU or the GPU; all variants
are timed in turn in the same run, on fresh random data, and medians are compared with the plain bf16 layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from qatapult.kernels import Scheme, choose_range, quantized_linear

TOKENS = Scheme(granularity="token")
CPU_SHAPES = "576x576,1536x576,576x1536,2048x2048"
GPU_SHAPES = "4096x4096,11008x4096,4096x11008"


@dataclass
class Layer:
    """A layer's tensors, fp32 master weights and bf16 activations as under autocast."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    grad: torch.Tensor
    scheme: Scheme

    @classmethod
    def random(cls, n: int, k: int, m: int, group: int, device: str) -> Layer:
        scheme = Scheme(bits=4, granularity="group" if group else "channel", group_size=group or None)
        weight = torch.randn(n, k, device=device)
        scale, _ = choose_range(weight, scheme)
        x = torch.randn(m, k, device=device).bfloat16().requires_grad_()
        grad = torch.randn(m, n, device=device).bfloat16()
        return cls(x, weight.requires_grad_(), scale.requires_grad_(), grad, scheme)

    def quantized(self, mode: str) -> torch.Tensor:
        return quantized_linear(
            self.x,
            self.weight,
            self.scale,
            weight_scheme=self.scheme,
            activation_scheme=TOKENS,
            mode=mode,  # type: ignore[arg-type]
        )

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        return linear(self.x.to(dtype), self.weight.to(dtype))

    def step(self, forward: Callable[[], torch.Tensor]) -> None:
        y = forward()
        y.backward(self.grad.to(y.dtype))
        self.x.grad = self.weight.grad = self.scale.grad = None


def medians(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds; each round goes through all calls in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=GPU_SHAPES if device == "cuda" else CPU_SHAPES, help="NxK,NxK,…")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{device}, torch {torch.__version__}, {options.tokens} tokens; ms, and times the plain bf16 layer")
    print("| N × K | scales | pass | integer | fake | fp32 | bf16 | integer / bf16 | integer / fake |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for group in (0, 64):
            layer = Layer.random(n, k, options.tokens, group, device)
            forwards: dict[str, Callable[[], torch.Tensor]] = {
                "integer": lambda at=layer: at.quantized("integer"),
                "fake": lambda at=layer: at.quantized("fake"),
                "fp32": lambda at=layer: at.plain(torch.float32),
                "bf16": lambda at=layer: at.plain(torch.bfloat16),
            }
            steps = {name: lambda at=layer, f=f: at.step(f) for name, f in forwards.items()}
            for what, calls in (("forward", forwards), ("both", steps)):
                t = medians(calls, device, options.rounds)
                figures = " | ".join(f"{t[name] * 1e3:.2f}" for name in forwards)
                print(
                    f"| {n} × {k} | {f'g{group}' if group else 'channel'} | {what} | {figures} "
                    f"| {t['integer'] / t['bf16']:.2f} | {t['integer'] / t['fake']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
