"""Fake-quantization against eager torch, ATen's operators, torchao and the memory-copy limit.

    python benchmarks/kernels/fake_quant.py                      # CPU, or the GPU where there is one
    python benchmarks/kernels/fake_quant.py --shape 11008x4096 --dtype bfloat16 --plot fake_quant.png

Candidates take turns in every round on fresh random tensors; the table shows medians, ratios to this
project's operator, and the share of the time that copying the same bytes takes (forward: read and write
once; backward: read the gradient and the input, write the gradient). On a GPU a round is a replayed CUDA
graph over several sets of tensors, larger together than the L2 cache, so that neither Python nor the cache
is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from qatapult.kernels import Scheme, choose_range, fake_quantize, fake_quantize_dynamic
from qatapult.kernels.common.allocator import keep_freed_memory

INT8 = Scheme(bits=8, granularity="token")


@dataclass
class Inputs:
    """One set of tensors: `x` `[N, K]`, its incoming gradient, and scales."""

    x: torch.Tensor
    grad: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fresh(cls, shape: tuple[int, int], dtype: torch.dtype, device: str, scheme: Scheme) -> Inputs:
        """New random numbers; the scale cuts some elements off, as a learned one does."""
        x = torch.randn(shape, device=device, dtype=dtype)
        scale, _ = choose_range(x, scheme)
        grad = torch.randn(shape, device=device, dtype=dtype)
        return cls(x.requires_grad_(), grad, (scale * 0.8).requires_grad_())


Forward = Callable[[Inputs], torch.Tensor]


@dataclass
class Candidate:
    """A way to compute, and what was measured of it (milliseconds).

    `capturable` is false where the operator waits for the GPU (to check its arguments), so that no CUDA
    graph can hold it: its waiting is measured too.
    """

    name: str
    forward: Forward
    learns_scale: bool = True
    capturable: bool = True
    forward_ms: list[float] = field(default_factory=list)
    both_ms: list[float] = field(default_factory=list)
    saved_bytes: float = 0.0


def eager_lsq(scheme: Scheme) -> Forward:
    """LSQ as it is usually written: straight-through rounding and a scaled gradient, by autograd."""

    def forward(inputs: Inputs) -> torch.Tensor:
        x = inputs.x.reshape(inputs.scale.numel(), -1)
        factor = (x.shape[1] * scheme.qmax) ** -0.5
        scale = inputs.scale.reshape(-1, 1)
        scale = (scale - scale * factor).detach() + scale * factor
        level = (x / scale).clamp(scheme.qmin, scheme.qmax)
        level = level + (level.round() - level).detach()
        return (level * scale).reshape(inputs.x.shape).to(inputs.x.dtype)

    return forward


def aten_learnable(scheme: Scheme) -> Forward:
    """ATen's operator with learned scales and zero points (its mask and gradients are not LSQ's)."""

    def forward(inputs: Inputs) -> torch.Tensor:
        x = inputs.x.reshape(inputs.scale.numel(), -1)
        zero = torch.zeros(x.shape[0], device=x.device)
        factor = (x.shape[1] * scheme.qmax) ** -0.5
        arguments = (inputs.scale.reshape(-1), zero, 0, scheme.qmin, scheme.qmax, factor)
        return (
            torch._fake_quantize_learnable_per_channel_affine(x.float(), *arguments)
            .reshape(inputs.x.shape)
            .to(x.dtype)
        )

    return forward


def aten_fixed(scheme: Scheme) -> Forward:
    """ATen's operator with fixed scales."""

    def forward(inputs: Inputs) -> torch.Tensor:
        x = inputs.x.reshape(inputs.scale.numel(), -1)
        zero = torch.zeros(x.shape[0], device=x.device, dtype=torch.int32)
        arguments = (inputs.scale.detach().reshape(-1), zero, 0, scheme.qmin, scheme.qmax)
        return (
            torch.fake_quantize_per_channel_affine(x.float(), *arguments).reshape(inputs.x.shape).to(x.dtype)
        )

    return forward


def torchao(scheme: Scheme) -> Forward:
    """torchao's fake quantizer, whose range is computed anew at each call (per token: asymmetric)."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    kind = torch.int8 if scheme.bits == 8 else torch.int4
    where = {"token": "per_token", "channel": "per_channel"}.get(scheme.granularity)
    config = (
        IntxFakeQuantizeConfig(kind, where, is_symmetric=where != "per_token")
        if where
        else IntxFakeQuantizeConfig(kind, group_size=scheme.group_size, is_symmetric=True)
    )
    quantizer = IntxFakeQuantizer(config)
    return lambda inputs: quantizer(inputs.x)


def eager_token(inputs: Inputs) -> torch.Tensor:
    """Per-token int8 in plain torch."""
    x = inputs.x.float()
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, 1.0, scale)
    value = (x / scale).round().clamp(-128, 127) * scale
    return (x + (value - x).detach()).to(inputs.x.dtype)


def candidates_for(scheme: Scheme, with_torchao: bool, with_compile: bool) -> list[Candidate]:
    """This project first, then its peers."""
    if scheme.granularity == "token":
        found = [
            Candidate("qatapult", lambda inputs: fake_quantize_dynamic(inputs.x, scheme), learns_scale=False),
            Candidate("eager", eager_token, learns_scale=False),
        ]
    else:
        found = [
            Candidate("qatapult", lambda inputs: fake_quantize(inputs.x, inputs.scale, scheme=scheme)),
            Candidate("eager", eager_lsq(scheme)),
            Candidate("ATen learnable", aten_learnable(scheme), capturable=False),
            Candidate("ATen fixed scale", aten_fixed(scheme), learns_scale=False, capturable=False),
        ]
    if with_compile:
        eager = found[1]
        found.append(Candidate("torch.compile", torch.compile(eager.forward), eager.learns_scale))
    if with_torchao:
        found.append(Candidate("torchao", torchao(scheme), learns_scale=False, capturable=False))
    return found


def run_forward(candidate: Candidate, inputs: Inputs) -> None:
    """No graph is recorded."""
    with torch.no_grad():
        candidate.forward(inputs)


def run_both(candidate: Candidate, inputs: Inputs) -> None:
    """Forward and backward, gradients thrown away."""
    wanted = (inputs.x, inputs.scale) if candidate.learns_scale else (inputs.x,)
    torch.autograd.grad(candidate.forward(inputs), wanted, inputs.grad)


def saved_bytes(candidate: Candidate, inputs: Inputs) -> float:
    """Bytes an element that autograd keeps for backward, beyond the inputs themselves."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (inputs.x, inputs.scale, inputs.grad)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = candidate.forward(inputs)
    total = sum(kept.values())
    del result
    return total / inputs.x.numel()


class Clock:
    """Milliseconds of a function of one set of inputs."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._graphs: dict[object, torch.cuda.CUDAGraph] = {}

    def __call__(
        self, key: object, function: Callable[[Inputs], object], sets: list[Inputs], capturable: bool = True
    ) -> float:
        """Time of one call; `key` names the function, whose CUDA graph is kept."""
        if not self.cuda:
            start = time.perf_counter()
            function(sets[0])
            return (time.perf_counter() - start) * 1e3
        if capturable and key not in self._graphs:
            self._graphs[key] = self._capture(function, sets)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        if capturable:
            self._graphs[key].replay()
        else:
            for inputs in sets:
                function(inputs)
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event) / len(sets)

    def _capture(self, function: Callable[[Inputs], object], sets: list[Inputs]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(sets[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in sets:
                function(inputs)
        return graph


def measure(options: argparse.Namespace, scheme: Scheme) -> tuple[list[Candidate], float]:
    """All candidates on one scheme, and the milliseconds of copying the tensor once."""
    shape = tuple(map(int, options.shape.split("x")))
    dtype = getattr(torch, options.dtype)

    def fresh() -> Inputs:
        return Inputs.fresh(shape, dtype, options.device, scheme)

    # Graphs hold their tensors; on the CPU a set is made anew in each round.
    sets = [fresh() for _ in range(4 if options.device == "cuda" else 1)]
    target = torch.empty_like(sets[0].x, requires_grad=False)
    has_torchao = find_spec("torchao") is not None and not options.no_torchao
    candidates = candidates_for(scheme, has_torchao, options.compile)
    clock, copies = Clock(options.device), []
    for candidate in candidates:
        candidate.saved_bytes = saved_bytes(candidate, sets[0])
        run_both(candidate, sets[0])
    for _ in range(options.rounds):
        if options.device != "cuda":
            sets = [fresh()]
        copies.append(clock("copy", lambda inputs: target.copy_(inputs.x.detach()), sets))
        for candidate in candidates:
            for run, times in ((run_forward, candidate.forward_ms), (run_both, candidate.both_ms)):
                function = functools.partial(run, candidate)
                times.append(clock((candidate.name, run), function, sets, candidate.capturable))
    return candidates, statistics.median(copies)


def rows_of(scheme: Scheme, candidates: list[Candidate], copy_ms: float) -> list[dict[str, object]]:
    """Medians, and ratios within this run."""
    ours = candidates[0]
    rows = []
    for candidate in candidates:
        forward, both = statistics.median(candidate.forward_ms), statistics.median(candidate.both_ms)
        # Read and write; the backward of a straight-through gradient moves nothing.
        copies = 1.0 if scheme.granularity == "token" else 2.5
        rows.append(
            {
                "scheme": scheme.describe(),
                "candidate": candidate.name,
                "forward ms": round(forward, 3),
                "forward and backward ms": round(both, 3),
                "times ours, forward": round(forward / statistics.median(ours.forward_ms), 2),
                "times ours, both": round(both / statistics.median(ours.both_ms), 2),
                "of copy speed, forward": round(copy_ms / forward, 3),
                "of copy speed, both": round(copies * copy_ms / both, 3),
                "saved bytes/element": round(candidate.saved_bytes, 3),
            }
        )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def plot(rows: list[dict[str, object]], path: str, title: str) -> None:
    """Bars of forward and backward time for each scheme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    figure, axes = plt.subplots(1, len(schemes), figsize=(5 * len(schemes), 3.5), squeeze=False)
    for axis, scheme in zip(axes[0], schemes, strict=True):
        chosen = [row for row in rows if row["scheme"] == scheme]
        axis.barh([row["candidate"] for row in chosen], [row["forward and backward ms"] for row in chosen])
        axis.invert_yaxis()
        axis.set_title(f"{scheme}, {title}")
        axis.set_xlabel("forward and backward, ms")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="4096x4096", help="rows x features")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--schemes", default="channel,g128,token", help="channel, g<size>, token")
    parser.add_argument("--compile", action="store_true", help="also eager torch under torch.compile")
    parser.add_argument("--no-torchao", action="store_true")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--plot", help="picture to write")
    parser.add_argument(
        "--page-faults", action="store_true", help="CPU: let the C library return freed memory"
    )
    options = parser.parse_args()
    if not options.page_faults:
        keep_freed_memory()
    rows = []
    for name in options.schemes.split(","):
        scheme = INT8 if name == "token" else Scheme(bits=4)
        if name.startswith("g"):
            scheme = Scheme(bits=4, granularity="group", group_size=int(name[1:]))
        rows += rows_of(scheme, *measure(options, scheme))
    where = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    title = f"{options.shape} {options.dtype} on {where}"
    print(f"{title}, torch {torch.__version__}, medians of {options.rounds} rounds\n")
    print_table(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"title": title, "rows": rows}, file, indent=1)
    if options.plot:
        plot(rows, options.plot, title)


if __name__ == "__main__":
    main()
