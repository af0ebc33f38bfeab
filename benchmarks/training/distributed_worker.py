"""One process of `distributed.py`: some steps of a large random model on the launcher's engine, timed and profiled.

accelerate launch --config_file CONFIG benchmarks/training/distributed_worker.py SETTINGS.json RESULT.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from kernel_shares import profile_step
from large_model import distillation_recipe, random_model, random_text, source_with_layers, trainer_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from qatapult.trainer.distill.cache import CachedTeacher, CacheFormat, write_cache
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.distill.teacher import InProcessTeacher, Teacher
from qatapult.trainer.loop.engine import choose_allocation, create_accelerator, multiplies_bf16
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.measure import CostMeter, peak_memory
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_json

WARM_UP = 2
CACHED_TOKENS = 64


@dataclass
class TimedTeacher:
    """A teacher whose seconds are added up, on the device's own clock where it has one."""

    teacher: Teacher
    device: torch.device
    spans: list[Any] = field(default_factory=list)

    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """See `Teacher`."""
        before = self._now()
        with record_function("teacher"):
            signal = self.teacher.signal(ids, blocks)
        self.spans.append((before, self._now()))
        return signal

    def seconds(self) -> float:
        """Since this was last asked; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            total = sum(a.elapsed_time(b) for a, b in self.spans) * 1e-3
        else:
            total = sum(b - a for a, b in self.spans)
        self.spans.clear()
        return total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def use_fsdp2_on_cpu() -> None:
    """Accelerate offers FSDP2 on accelerators only; told that the world is there, it shards on gloo as well."""
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build_teacher(
    settings: dict[str, Any], recipe: Recipe, accelerator: Accelerator
) -> tuple[Teacher, float]:
    """The teacher, and the bytes of its weights that this process holds."""
    dtype = torch.bfloat16 if multiplies_bf16(accelerator.device) else torch.float32
    model = random_model(recipe, dtype, accelerator.device)
    if settings["teacher"] != "cached":
        teacher = InProcessTeacher(model, accelerator)
        return teacher, held_bytes(model)
    folder, text = Path(settings["cache"]), random_text(recipe)
    layout = CacheFormat(
        "random", "random", len(text.train), recipe.data.block_size, model.config.vocab_size, CACHED_TOKENS
    )
    write_cache(folder, layout, model, text.train, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return CachedTeacher(folder, "random", 1.0, accelerator.device), 0.0


def held_bytes(model: nn.Module) -> float:
    """Bytes of weights that lie in this process: its shard under FSDP2 and ZeRO-3."""
    total = 0
    for parameter in model.parameters():
        own = (
            parameter.to_local()
            if isinstance(parameter, DTensor)
            else getattr(parameter, "ds_tensor", parameter)
        )
        total += own.numel() * own.element_size()
    return float(total)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Time, peak memory and shares; the slowest and the largest rank count."""
    on_gpu = torch.cuda.is_available()
    if settings["engine"] == "fsdp2" and not on_gpu:
        use_fsdp2_on_cpu()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = distillation_recipe(
        source_with_layers(settings["shape"], settings["layers"]),
        settings["block_size"],
        settings["batch"],
        processes,
        gradient_checkpointing=settings["checkpointing"],
    )
    accelerator = create_accelerator(recipe)
    choose_allocation(accelerator)
    device = accelerator.device
    teacher, teacher_bytes = build_teacher(settings, recipe, accelerator)
    timed = TimedTeacher(teacher, device)
    model = prepare(random_model(recipe, torch.float32, device), recipe.quantization, recipe.qat.method)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(accelerator, recipe, model, timed, Path(scratch))  # type: ignore[arg-type]
        figures = timed_steps(trainer, timed, settings["steps"], device)
        shares = None
        if accelerator.is_main_process:
            table = Path(settings["table"])
            shares = profile_step(trainer.step, device, table).as_json()
        else:
            trainer.step()
    mine = torch.tensor([*figures, teacher_bytes], dtype=torch.float64, device=device)
    seconds, peak, loader, in_teacher, held = accelerator.gather(mine[None]).max(dim=0).values.tolist()
    return {
        "engine": str(accelerator.distributed_type).rpartition(".")[2],
        "processes": accelerator.num_processes,
        "seconds": seconds,
        "peak_bytes": peak,
        "loader_share": loader / seconds,
        "teacher_share": in_teacher / seconds,
        "teacher_bytes_held": held,
        "tokens_per_second_per_process": trainer.tokens_per_step / accelerator.num_processes / seconds,
        "shares": shares,
        "main": accelerator.is_main_process,
    }


def timed_steps(
    trainer: Trainer, teacher: TimedTeacher, steps: int, device: torch.device
) -> tuple[float, float, float, float]:
    """Medians of a step's seconds, peak bytes, and medians of the loader's and the teacher's seconds."""
    seconds, loader, in_teacher = [], [], []
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            teacher.seconds()
            CostMeter(device)  # loading and first allocations do not count
        started = time.perf_counter()
        result = trainer.step()
        own = teacher.seconds()
        seconds.append(time.perf_counter() - started)
        loader.append(result.loader_seconds)
        in_teacher.append(own)
    medians = (statistics.median(values[WARM_UP:]) for values in (seconds, loader, in_teacher))
    whole, waiting, teaching = medians
    return whole, float(peak_memory(device)), waiting, teaching


def main() -> None:
    """Measure; the main process writes the result."""
    settings_file, result = map(Path, sys.argv[1:])
    measured = measure(json.loads(settings_file.read_text(encoding="utf-8")))
    if measured.pop("main"):
        write_json(result, measured)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
