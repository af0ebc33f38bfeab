"""Refine a plan's assumptions with a few real steps on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatapult.trainer.plan.batch_size import resolve_batch_size
from qatapult.trainer.plan.hardware import Cluster, parse_cluster
from qatapult.trainer.plan.memory import Assumptions, memory
from qatapult.trainer.plan.model_shape import shape_of
from qatapult.trainer.plan.settings import Setting, Teacher
from qatapult.trainer.plan.speed import SpeedAssumptions, step_time
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import dump_recipe
from qatapult.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the assumptions that follow.

    Attributes:
        predicted_bytes: peak memory of the same step by the model, before calibration.
        predicted_seconds: likewise its time.
        speed_applies: whether measured and planned device are of a kind, so that its rates were adopted.
    """

    measured: Mapping[str, Any]
    predicted_bytes: float
    predicted_seconds: float
    speed_applies: bool
    assumptions: Assumptions
    speed: SpeedAssumptions

    def describe(self) -> str:
        """One line: measured against predicted, and what was adopted."""
        kept = (
            "rates and memory adopted" if self.speed_applies else "memory adopted, rates not: another device"
        )
        return (
            f"Calibrated here: peak memory {self.measured['peak_memory_bytes'] / 1e9:.2f} GB "
            f"({self.predicted_bytes / 1e9:.2f} predicted), step {self.measured['seconds_per_step']:.3g} s "
            f"({self.predicted_seconds:.3g} predicted); {kept}."
        )


def calibrate(recipe: Recipe, cluster: Cluster, steps: int) -> Calibration:
    """Measure some steps of a recipe in one process on this machine, and fit the assumptions to them.

    Args:
        recipe: as planned; its model and micro batch must fit this machine.
        cluster: what the plan is for. Rates measured on a GPU are taken as those of the planned GPU, rates
            measured on a CPU only for plans on this CPU; the size of activations is carried over in any case.
        steps: measured optimizer steps, at least 1.

    Raises:
        UserError: if the steps cannot be run here.
    """
    if steps < 1:
        raise UserError(f"--calibrate {steps} must be at least 1 step")
    whole = resolve_batch_size(recipe)
    own = whole.model_copy(update={"qat": whole.qat.model_copy(update={"global_batch_tokens": None})})
    measured = run_probe(own, steps)
    on_gpu = measured["device"] == "cuda"
    here = replace(cluster, gpus=1, nodes=1) if on_gpu else parse_cluster("1xCPU")
    setting = Setting("single", "none", own.qat.gradient_checkpointing, own.qat.batch_size, teacher_of(own))
    shape = shape_of(own.model)
    assumptions, speed = Assumptions(), SpeedAssumptions()
    needs = memory(own, shape, here, setting, assumptions)
    runtime = float(measured["runtime_memory_bytes"])
    others = needs.device - needs.activations - needs.runtime + runtime
    scale = 1.0
    # What is left cannot be told apart from noise where activations are a small part.
    if needs.activations > 0.1 * measured["peak_memory_bytes"]:
        scale = max(0.1, (measured["peak_memory_bytes"] - others) / needs.activations)
    time = step_time(own, shape, here, setting, speed)
    factor = measured["seconds_per_step"] / time.seconds
    of_a_kind = on_gpu != cluster.gpu.is_cpu
    if of_a_kind:
        speed = replace(
            speed,
            efficiency=speed.efficiency / factor,
            bandwidth_efficiency=speed.bandwidth_efficiency / factor,
        )
    adopted = replace(assumptions, saved_scale=scale, fragmentation=0.0, heap_fragmentation=0.0)
    if of_a_kind:
        adopted = replace(adopted, **{"runtime_gpu" if on_gpu else "runtime_cpu": runtime})  # type: ignore[arg-type]
    return Calibration(measured, needs.device, time.seconds, of_a_kind, adopted, speed)


def teacher_of(recipe: Recipe) -> Teacher:
    """Where a single process has the teacher of a recipe."""
    return "none" if recipe.qat.distillation.kind == "none" else "whole"


def run_probe(
    recipe: Recipe,
    steps: int,
    launcher: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the probe in processes of its own.

    Args:
        recipe: what to run.
        steps: measured steps.
        launcher: command before `-m qatapult.trainer.plan.probe`, such as that of torchrun.
        environment: variables beside this process's own.

    Raises:
        UserError: if it fails; the message is the last line of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "recipe.yaml", Path(folder) / "result.json"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        done = subprocess.run(
            [*launcher, "-m", "qatapult.trainer.plan.probe", str(file), str(steps), str(result)],
            env=os.environ | dict(environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not result.exists():
            raise UserError(
                f"the measured steps failed (exit status {done.returncode}): {_reason(done.stderr)}"
            )
        measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def _reason(stderr: str) -> str:
    """The last line that names an error: launchers print summaries of their own below it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return [*(lines or ["no message"]), *errors][-1][:300]
