"""The fused distillation loss against plain torch, torch.compile and Liger-Kernel.

    python benchmarks/kernels/distillation_loss.py                     # CPU, or the GPU where there is one
    python benchmarks/kernels/distillation_loss.py --tokens 1 16 64 --plot loss.png
    python benchmarks/kernels/distillation_loss.py --train-head        # with the gradient of the head

One call is loss and gradients, with the products with both heads. Candidates take turns in every round on
fresh random tensors; the table shows medians, ratios to plain torch, and the most memory held at a time
beyond the inputs and the gradients. `products` are the matrix products alone, in chunks of the same size:
what no implementation goes below. `rows alone` compares softmax, divergence and gradient on given logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from qatapult.kernels import distillation_loss
from qatapult.kernels.distillation import chunks
from qatapult.kernels.distillation.objective import Objective
from qatapult.kernels.distillation.select import row_kernels


@dataclass
class Inputs:
    """Hidden states `[T, D]` and heads `[V, D]` of student and teacher."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @classmethod
    def fresh(cls, tokens: int, shape: tuple[int, int], options: argparse.Namespace) -> Inputs:
        """New random numbers: logits with a standard deviation of 3, as a trained model's."""
        vocabulary, dim = shape
        where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        hidden, teacher_hidden = (torch.randn(tokens, dim, **where) for _ in range(2))
        head, teacher_head = (torch.randn(vocabulary, dim, **where) * (3 * dim**-0.5) for _ in range(2))
        hidden.requires_grad_()
        return cls(hidden, head.requires_grad_(options.train_head), teacher_hidden, teacher_head)

    def clear(self) -> None:
        self.hidden.grad = self.head.grad = None

    @property
    def gradient_bytes(self) -> int:
        wanted = [tensor for tensor in (self.hidden, self.head) if tensor.requires_grad]
        return sum(tensor.numel() * tensor.element_size() for tensor in wanted)


Call = Callable[[Inputs], object]


@dataclass
class Candidate:
    """A way to compute, and what was measured of it."""

    name: str
    call: Call
    milliseconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0


def plain_loss(inputs: Inputs) -> Tensor:
    """Forward KL as it is usually written, in fp32 from the logits on."""
    student = (inputs.hidden @ inputs.head.t()).float()
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_head.t()).float()
    student, teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def fused(inputs: Inputs) -> None:
    distillation_loss(inputs.hidden, inputs.head, inputs.teacher_hidden, inputs.teacher_head).backward()


def products(inputs: Inputs) -> None:
    """Both heads' products and the gradients', in the fused loss's chunks, reusing the logits' memory."""
    size = chunks.chunk_size(len(inputs.hidden), inputs.head)
    with torch.no_grad():
        logits = chunks.Logits(inputs.hidden, inputs.head, size)
        teacher = chunks.Logits(inputs.teacher_hidden, inputs.teacher_head, size)
        grad_head = torch.zeros_like(logits.head) if inputs.head.requires_grad else None
        for start in range(0, len(inputs.hidden), size):
            part = slice(start, start + size)
            chunk = logits.of(part)
            teacher.of(part)
            torch.mm(chunk, logits.head)
            if grad_head is not None:
                grad_head.addmm_(chunk.t(), logits.chunk(part))


def liger(inputs: Inputs) -> None:
    """Liger-Kernel's fused linear JSD in the limit that is forward KL. It always differentiates the head."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    head = inputs.head.detach().requires_grad_()
    tensors = (inputs.hidden, head, inputs.teacher_hidden, inputs.teacher_head)
    LigerFusedLinearJSD(jsd_beta=0.0)(*tensors, None).backward()


def candidates(options: argparse.Namespace) -> list[Candidate]:
    """What can run here; plain torch first, for the ratios."""
    compiled = torch.compile(plain_loss, dynamic=True)
    found = [
        Candidate("plain torch", lambda inputs: plain_loss(inputs).backward()),
        Candidate("torch.compile", lambda inputs: compiled(inputs).backward()),
        Candidate("Liger-Kernel", liger),
        Candidate("qatapult", fused),
        Candidate("products", products),
    ]
    skipped = set(options.skip)
    if options.device == "cpu" or find_spec("liger_kernel") is None:
        skipped.add("Liger-Kernel")
    return [candidate for candidate in found if candidate.name not in skipped]


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call; on a GPU between events, so that launches that hide behind work are hidden."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3


def extra_bytes(call: Callable[[], object], device: str) -> int:
    """The most that torch's allocator held at a time beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes), default=0)


def measure(tokens: int, shape: tuple[int, int], options: argparse.Namespace) -> list[Candidate]:
    """Medians over rounds in which all candidates take turns."""
    found = candidates(options)
    inputs = Inputs.fresh(tokens, shape, options)
    for candidate in found:
        for _ in range(1 if options.device == "cpu" else 3):
            candidate.call(inputs)
        inputs.clear()
        held = extra_bytes(partial(candidate.call, inputs), options.device)
        candidate.extra_bytes = max(0, held - inputs.gradient_bytes)
        inputs.clear()
    for _ in range(options.rounds):
        inputs = Inputs.fresh(tokens, shape, options)
        for candidate in found:
            elapsed = seconds(partial(candidate.call, inputs), options.device)
            candidate.milliseconds.append(1e3 * elapsed)
            inputs.clear()
    return found


def rows_alone(tokens: int, vocabulary: int, options: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of plain torch and of the fused rows, from logits to their gradient."""
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    times: dict[str, list[float]] = {"plain": [], "fused": []}
    for _ in range(options.rounds + 1):
        student, teacher = (3 * torch.randn(tokens, vocabulary, **where) for _ in range(2))
        leaf = student.clone().requires_grad_()

        def plain(leaf: Tensor = leaf, teacher: Tensor = teacher) -> None:
            pair = F.log_softmax(leaf.float(), -1), F.log_softmax(teacher.float(), -1)
            F.kl_div(*pair, log_target=True, reduction="batchmean").backward()

        def rows(student: Tensor = student, teacher: Tensor = teacher) -> None:
            row_kernels(student).divergence_rows_(student, teacher, None, Objective(), True)

        times["plain"].append(seconds(plain, options.device))
        times["fused"].append(seconds(rows, options.device))
    plain_ms, fused_ms = (1e3 * statistics.median(found[1:]) for found in times.values())
    return plain_ms, fused_ms


def table(results: dict[int, list[Candidate]]) -> str:
    """Markdown: a row for each number of tokens and candidate."""
    lines = [
        "| tokens | | ms | of plain torch | extra MiB | of plain torch |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for tokens, found in results.items():
        base = found[0]
        base_ms = statistics.median(base.milliseconds)
        for candidate in found:
            ms = statistics.median(candidate.milliseconds)
            memory = candidate.extra_bytes / max(1, base.extra_bytes)
            lines.append(
                f"| {tokens} | {candidate.name} | {ms:.1f} | {ms / base_ms:.2f} "
                f"| {candidate.extra_bytes / 2**20:.0f} | {memory:.2f} |"
            )
    return "\n".join(lines)


def plot(results: dict[int, list[Candidate]], path: str) -> None:
    """Bars of time and of extra memory, each relative to plain torch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [candidate.name for candidate in next(iter(results.values()))]
    width = 0.8 / len(names)
    for axis, title, of in (
        (axes[0], "time", lambda candidate: statistics.median(candidate.milliseconds)),
        (axes[1], "extra memory", lambda candidate: candidate.extra_bytes),
    ):
        for index, name in enumerate(names):
            heights = [of(found[index]) / max(1e-9, of(found[0])) for found in results.values()]
            places = [place + index * width for place in range(len(results))]
            axis.bar(places, heights, width, label=name)
        axis.set_xticks([place + 0.4 for place in range(len(results))], [f"{key} tokens" for key in results])
        axis.set_title(f"{title}, plain torch = 1")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024 2048; on a GPU 1024 8192")
    parser.add_argument("--shape", help="VxD; by default 49152x576, on a GPU 128256x4096")
    parser.add_argument("--dtype", help="by default float32, on a GPU bfloat16")
    parser.add_argument("--train-head", action="store_true", help="also the gradient of the student's head")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], help="names of candidates to leave out")
    parser.add_argument("--plot", help="file for the plot")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    small = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if small else "bfloat16")
    vocabulary, dim = map(int, (options.shape or ("49152x576" if small else "128256x4096")).split("x"))
    device = torch.get_num_threads() if small else torch.cuda.get_device_name()
    print(
        f"{device}{' threads' * small}, torch {torch.__version__}, {options.dtype}, V {vocabulary}, D {dim}\n"
    )
    counts = options.tokens or ([1024, 2048] if small else [1024, 8192])
    results = {tokens: measure(tokens, (vocabulary, dim), options) for tokens in counts}
    print(table(results))
    for tokens in counts:
        plain_ms, fused_ms = rows_alone(min(tokens, 2048), vocabulary, options)
        print(
            f"\nrows alone, {min(tokens, 2048)} tokens: plain torch {plain_ms:.2f} ms, "
            f"qatapult {fused_ms:.2f} ms, {plain_ms / fused_ms:.1f} times faster"
        )
    if options.plot:
        plot(results, options.plot)
    if options.json:
        figures = {
            tokens: [
                {"name": one.name, "ms": one.milliseconds, "extra_bytes": one.extra_bytes} for one in found
            ]
            for tokens, found in results.items()
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
