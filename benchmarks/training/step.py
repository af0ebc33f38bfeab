"""Seconds a step and peak memory of fine-tuning, distillation and QAT, by this project, plain torch and torchao.

    python benchmarks/training/step.py                          # CPU, or the GPU where there is one
    python benchmarks/training/step.py --rounds 3 --json step.json --plot step.png
    python benchmarks/training/step.py --only "distillation (plain torch)" "QAT, integer forward"
    python benchmarks/training/step.py --profile "QAT, integer forward"   # where one step's time goes

All candidates train the same model on the same random tokens and train the same parameters (the decoder's
linears; QAT their scales as well). In every round each candidate has a process of its own, which loads, takes one
step that does not count, then the measured ones; its peak memory is counted from after loading: resident memory
on a CPU, the allocator's peak on a GPU. The plain loops are written with transformers and torch alone: autocast,
whole logits in fp32, torch's AdamW and clipping. "memory kept": the same loop with glibc told not to return freed
memory to the system, which this project does on CPUs by itself. torchao's QAT runs in the plain distillation
loop. Quantization is W4A8: int4 per channel, int8 per token.
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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qatapult.kernels.common.allocator import keep_freed_memory
from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import TokenizedData
from qatapult.trainer.distill.cache import CachedTeacher, CacheFormat, write_cache
from qatapult.trainer.distill.teacher import InProcessTeacher, Teacher
from qatapult.trainer.loop.engine import create_accelerator, multiplies_bf16
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.measure import CostMeter, device_name, peak_memory
from qatapult.trainer.models import load_config, load_model
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.schema import Model, Recipe

FINE_TUNING, DISTILLATION = "fine-tuning (plain torch)", "distillation (plain torch)"
KEPT, TORCHAO = "distillation (plain torch, memory kept)", "QAT (torchao, plain torch)"
OWN_DISTILLATION, FAKE = "distillation (qatapult)", "QAT, fake-quantized forward"
INTEGER, CACHED = "QAT, integer forward", "QAT, integer forward, cached teacher"
CANDIDATES = (DISTILLATION, FINE_TUNING, KEPT, TORCHAO, OWN_DISTILLATION, FAKE, INTEGER, CACHED)
KEEPS_MEMORY = (KEPT, OWN_DISTILLATION, FAKE, INTEGER, CACHED)
Step = Callable[[], object]
LEARNING_RATE = 1e-5
CACHED_TOKENS = 64


class Workshop:
    """Model, teacher and data of one candidate on one device.

    Args:
        options: of the command line.
        scratch: folder for the cache of teacher logits and what a trainer writes.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.source = Model(source=options.model)
        self.options, self.scratch = options, scratch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precise = torch.bfloat16 if multiplies_bf16(self.device) else torch.float32
        generator = torch.Generator().manual_seed(0)
        shape = (4 * options.blocks, options.block_size)
        self.blocks = torch.randint(load_config(self.source).vocab_size, shape, generator=generator)
        self._position = 0

    def step_of(self, name: str) -> Step:
        """One optimizer step of a candidate."""
        if name in KEEPS_MEMORY and self.device.type == "cpu":
            keep_freed_memory()
        if name == FINE_TUNING:
            return PlainLoop(self, self.student(), None).step
        if name in (DISTILLATION, KEPT):
            return PlainLoop(self, self.student(), self.teacher()).step
        if name == TORCHAO:
            return PlainLoop(self, torchao_model(self.student()), self.teacher()).step
        teacher: Teacher = self.cached_teacher() if name == CACHED else InProcessTeacher(self.teacher())
        return trainer_of(self, teacher, name != OWN_DISTILLATION, name in (INTEGER, CACHED)).step

    def student(self) -> PreTrainedModel:
        """Another fp32 model whose linears alone train."""
        model = load_model(self.source).to(self.device).train().requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.requires_grad_(True)
        return model

    def next_ids(self) -> Tensor:
        """Token ids of a step, int64 `[blocks, block size]`."""
        self._position = (self._position + self.options.blocks) % len(self.blocks)
        return self.blocks[self._position : self._position + self.options.blocks].to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        low = self.precise != torch.float32
        return torch.autocast(self.device.type, self.precise) if low else nullcontext()

    def teacher(self) -> PreTrainedModel:
        """Frozen, in bf16 where the hardware multiplies it."""
        return load_model(self.source, self.precise).to(self.device).requires_grad_(False)

    def write_cache(self) -> None:
        """The teacher's most likely tokens of all blocks, on disk."""
        vocabulary, size = load_config(self.source).vocab_size, self.blocks.shape[1]
        layout = CacheFormat("tokens", "teacher", len(self.blocks), size, vocabulary, CACHED_TOKENS)
        write_cache(self.scratch / "cache", layout, self.teacher(), self.blocks)

    def cached_teacher(self) -> CachedTeacher:
        return CachedTeacher(self.scratch / "cache", "tokens", 1.0, self.device)


class PlainLoop:
    """What a user writes with transformers and torch alone.

    Args:
        workshop: device and data.
        model: trains where it requires gradients.
        teacher: None to train on the text.
    """

    def __init__(self, workshop: Workshop, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.workshop, self.model, self.teacher = workshop, model, teacher
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self) -> None:
        ids = self.workshop.next_ids()
        with self.workshop.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits
        self._loss(logits, ids).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        if self.teacher is None:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits
        pair = (F.log_softmax(each.flatten(0, 1).float(), -1) for each in (logits, wanted))
        return F.kl_div(*pair, log_target=True, reduction="batchmean")


def torchao_model(model: PreTrainedModel) -> PreTrainedModel:
    """torchao's QAT: int4 per channel, int8 per token (asymmetric: it has no symmetric grid per token)."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def trainer_of(workshop: Workshop, teacher: Teacher, quantized: bool, integer: bool) -> Trainer:
    """This project's loop, on the engine that it would choose here."""
    options = workshop.options
    recipe = Recipe.model_validate(
        {
            "name": "step",
            "model": {"source": options.model},
            "data": {"block_size": options.block_size},
            "qat": {
                "batch_size": options.blocks,
                "integer_forward": integer,
                "optimizer": {"learning_rate": LEARNING_RATE},
            },
        }
    )
    accelerator = create_accelerator(recipe)
    model = load_model(workshop.source).to(workshop.device)
    if quantized:
        prepare(model, recipe.quantization, recipe.qat.method)
    held_out = workshop.blocks[:1]
    data = TokenizedData(workshop.blocks, held_out, torch.zeros_like(held_out))
    log, console = MetricsLog(None), Console(quiet=True)
    return Trainer(accelerator, recipe, model, teacher, data, workshop.scratch, log, console)


def synchronized(step: Step, device: torch.device) -> float:
    """Seconds of one step, work on the GPU included."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def visit(name: str, options: argparse.Namespace) -> Visit:
    """One candidate's steps of a round, in a process of its own."""
    keys = ("model", "blocks", "block_size", "steps", "scratch")
    own = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in keys]
    command = [sys.executable, __file__, *own, "--visit", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return Visit(**json.loads(done.stdout.strip().splitlines()[-1]))


@dataclass
class Visit:
    """What a process measured: seconds of each step, and its peak memory in bytes."""

    seconds: list[float]
    peak: int


def measure(name: str, options: argparse.Namespace) -> Visit:
    """What `visit` asks for, in this process."""
    workshop = Workshop(options, Path(options.scratch))
    step = workshop.step_of(name)
    CostMeter(workshop.device)  # what loading took does not count
    step()  # allocates optimizer states, compiles
    seconds = [synchronized(step, workshop.device) for _ in range(options.steps)]
    return Visit(seconds, peak_memory(workshop.device))


def profile(name: str, options: argparse.Namespace) -> str:
    """Where the third step's time goes, by operator."""
    workshop = Workshop(options, Path(options.scratch))
    step = workshop.step_of(name)
    for _ in range(2):
        step()
    with torch.profiler.profile() as profiler:
        synchronized(step, workshop.device)
    key = "self_cuda_time_total" if workshop.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)


def table(seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """Markdown: medians, and ratios to both distillation loops."""
    columns = ["", "s a step", "of plain", "of own", "peak GB", "of plain", "of own"]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * 6 + "|"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        cells = [name, f"{median:.3f}"]
        cells += [_ratio(median, medians.get(base)) for base in (DISTILLATION, OWN_DISTILLATION)]
        cells.append(f"{memory[name] / 1e9:.2f}")
        cells += [_ratio(memory[name], memory.get(base)) for base in (DISTILLATION, OWN_DISTILLATION)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(value: float, base: float | None) -> str:
    return "" if base is None else f"{value / base:.3f}"


def plot(seconds: dict[str, list[float]], memory: dict[str, int], path: str) -> None:
    """Bars of time and memory, with every step's time as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    places = range(len(seconds), 0, -1)
    axes[0].barh(places, [statistics.median(values) for values in seconds.values()], color="#7aa6d8")
    for place, values in zip(places, seconds.values(), strict=True):
        axes[0].plot(values, [place] * len(values), "k.", markersize=3)
    axes[1].barh(places, [memory[name] / 1e9 for name in seconds], color="#d8a67a")
    axes[0].set_yticks(places, seconds)
    axes[0].set_xlabel("seconds a step")
    axes[1].set_xlabel("peak memory, GB")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="random:smollm2-135m", help="as a recipe's model.source")
    parser.add_argument("--blocks", type=int, default=4, help="sequences a step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each candidate")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--visit", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--profile", choices=CANDIDATES, metavar="NAME", help="profile one step instead")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--plot", help="file for the plot")
    options = parser.parse_args()
    if options.visit:
        print(json.dumps(asdict(measure(options.visit, options))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = scratch
        if CACHED in (options.profile, *options.only):
            Workshop(options, Path(scratch)).write_cache()
        if options.profile:
            print(profile(options.profile, options))
        else:
            compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure all candidates and report."""
    visits: dict[str, list[Visit]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name, own in visits.items():
            own.append(visit(name, options))
    seconds = {name: [one for each in own for one in each.seconds] for name, own in visits.items()}
    memory = {name: max(each.peak for each in own) for name, own in visits.items()}
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = f"{options.blocks} × {options.block_size} tokens a step"
    print(f"{device}, torch {torch.__version__}, {options.model}, {tokens}, ", end="")
    print(f"median of {options.rounds} × {options.steps} steps\n")
    print(table(seconds, memory))
    if options.plot:
        plot(seconds, memory, options.plot)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": device, "seconds": seconds, "memory": memory}, file, indent=1)


if __name__ == "__main__":
    main()
