"""Where a step's time goes, from torch.profiler: what each kernel is for, and which communication nothing hides.

On a GPU the kernels are counted, on a CPU the operators' own time. A kernel's purpose follows from the operators and
ranges it was launched in, and from its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: Purpose, by a pattern over the kernel's name and then over the names around it; the first match counts.
_BY_KERNEL = (
    ("communication", r"nccl|gloo|c10d"),
    (
        "matrix products",
        r"gemm|cutlass|nvjet|xmma|cublas|int_mm|aten::(mm|addmm|bmm|matmul|linear)\b|^_?packed_gemm",
    ),
    ("attention", r"flash|fmha|attention|cudnn.*sdp"),
)
_AROUND = (
    ("teacher", r"^teacher$"),
    ("loss", r"distillation|cross_entropy|log_softmax"),
    ("fake-quantization", r"fake_quant|quantized_linear|quantize|dynamic_kernel"),
    ("optimizer", r"Optimizer\.|adam|foreach|multi_tensor|clip_grad"),
    ("copies", r"memcpy|memset|copy_|_to_copy"),
)


@dataclass
class Shares:
    """Microseconds by purpose.

    Attributes:
        purposes: microseconds of kernels by what they are for; `teacher` has everything that runs inside it.
        exposed_communication: microseconds in which the device only communicated.
        busy: microseconds in which the device did anything.
    """

    purposes: Counter[str] = field(default_factory=Counter)
    exposed_communication: float = 0.0
    busy: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Shares of all kernels' time, and seconds."""
        total = sum(self.purposes.values()) or 1.0
        return {
            "share": {name: round(value / total, 4) for name, value in self.purposes.most_common()},
            "kernel_seconds": total * 1e-6,
            "busy_seconds": self.busy * 1e-6,
            "exposed_communication_seconds": self.exposed_communication * 1e-6,
        }


def profile_step(step: Callable[[], object], device: torch.device, table: Path | None = None) -> Shares:
    """Run one step under the profiler.

    Args:
        step: what to run; run it before, so that nothing is compiled now.
        device: where it computes.
        table: file for the profiler's own table of the longest kernels.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    if table is not None:
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table.write_text(profiled.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70))
    events = list(profiled.events())
    shares = Shares()
    for name, around, microseconds in _kernels(events, on_gpu):
        shares.purposes[purpose(name, around)] += microseconds
    if on_gpu:
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events if _is_kernel(e)]
        others = [span[1:] for span in spans if purpose(span[0], ()) != "communication"]
        shares.busy = _covered(span[1:] for span in spans)
        shares.exposed_communication = shares.busy - _covered(others)
    return shares


def purpose(kernel: str, around: Iterable[str]) -> str:
    """What a kernel is for, by its name and the names of the operators and ranges around it, innermost first."""
    names = [kernel, *around]
    if any(name == "teacher" for name in names) and not re.search(_BY_KERNEL[0][1], kernel, re.IGNORECASE):
        return "teacher"
    for found, pattern in _BY_KERNEL:
        if re.search(pattern, kernel, re.IGNORECASE):
            return found
    for name in names:
        for found, pattern in _AROUND:
            if re.search(pattern, name, re.IGNORECASE):
                return found
    return "other element-wise"


def _kernels(events: list[Any], on_gpu: bool) -> Iterator[tuple[str, list[str], float]]:
    """Name, names around and microseconds of every kernel (on a CPU: of every operator without its children)."""
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        around = _ancestors(event)
        if not on_gpu:
            yield event.name, around, event.self_cpu_time_total
        for kernel in event.kernels if on_gpu else ():
            yield kernel.name, [event.name, *around], kernel.duration


def _ancestors(event: Any) -> list[str]:
    names = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
