"""Every setting's memory, time and cost for a recipe on a cluster, and the cheapest one that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qatapult.trainer.plan.hardware import Cluster, Gpu
from qatapult.trainer.plan.memory import Assumptions, Memory, compute_bytes, memory, saved_bytes_per_token
from qatapult.trainer.plan.model_shape import ModelShape, shape_of
from qatapult.trainer.plan.settings import ENGINES, Setting, settings, step_tokens
from qatapult.trainer.plan.speed import SpeedAssumptions, StepTime, flops_per_token, step_time
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe

#: Share of the usable memory that stays free, so that a longer batch or an evaluation does not end the run.
HEADROOM = 0.05

#: A simpler setting is recommended if it takes at most this share longer: the model is not more exact than
# that.
SIMPLICITY = 0.03


@dataclass(frozen=True)
class Candidate:
    """A setting with what it takes.

    Attributes:
        hours: wall time of the recipe's tokens, writing the teacher's cache included.
        cost: US dollars for it.
    """

    setting: Setting
    memory: Memory
    fits: bool
    why_not: str
    step: StepTime
    tokens_per_second: float
    hours: float
    cost: float

    def as_json(self) -> dict[str, Any]:
        """The candidate in plain types: bytes, seconds, hours and dollars."""
        return {
            "setting": asdict(self.setting) | {"name": self.setting.name},
            "memory_bytes": {**self.memory.parts, "total": self.memory.device, "host": self.memory.host},
            "fits": self.fits,
            "why_not": self.why_not,
            "seconds_per_step": self.step.seconds,
            "step_seconds": asdict(self.step),
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Plan:
    """All candidates, cheapest first, with the cluster and the assumptions they were computed with."""

    recipe: Recipe
    shape: ModelShape
    cluster: Cluster
    candidates: Sequence[Candidate]
    assumptions: Assumptions = field(default_factory=Assumptions)
    speed: SpeedAssumptions = field(default_factory=SpeedAssumptions)

    @property
    def recommended(self) -> Candidate | None:
        """The simplest candidate that fits and is within `SIMPLICITY` of the cheapest."""
        fitting = [candidate for candidate in self.candidates if candidate.fits]
        if not fitting:
            return None
        limit = min(candidate.hours for candidate in fitting) * (1 + SIMPLICITY)
        return min(
            (candidate for candidate in fitting if candidate.hours <= limit),
            key=lambda candidate: (_complexity(candidate.setting), candidate.hours),
        )

    def best_per_engine(self) -> list[Candidate]:
        """The cheapest fitting candidate of each engine and teacher, or its smallest one if none fits."""
        best: dict[tuple[str, str], Candidate] = {}
        for candidate in self.candidates:
            key = (candidate.setting.name, candidate.setting.teacher)
            known = best.get(key)
            smaller = known is not None and candidate.memory.device < known.memory.device
            if known is None or (not known.fits and (candidate.fits or smaller)):
                best[key] = candidate
        return sorted(
            best.values(), key=lambda candidate: (not candidate.fits, candidate.cost, candidate.hours)
        )


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    assumptions: Assumptions | None = None,
    speed: SpeedAssumptions | None = None,
) -> Plan:
    """Compute every candidate for a recipe on a cluster. Loads no weights.

    Raises:
        UserError: if the recipe's model has no readable shape, or its blocks are longer than makes sense.
    """
    shape = shape_of(recipe.model)
    assumptions, speed = assumptions or Assumptions(), speed or SpeedAssumptions()
    found = [
        _candidate(recipe, shape, cluster, setting, assumptions, speed)
        for setting in settings(recipe, cluster)
    ]
    found.sort(key=lambda candidate: (not candidate.fits, round(candidate.hours, 3)))
    return Plan(recipe, shape, cluster, found, assumptions, speed)


def only_engine(plan: Plan, engine: str) -> Plan:
    """The plan with one engine's candidates.

    Raises:
        UserError: if there is no such engine on this cluster.
    """
    kept = [candidate for candidate in plan.candidates if candidate.setting.engine == engine]
    if not kept:
        known = sorted({candidate.setting.engine for candidate in plan.candidates}, key=ENGINES.index)
        raise UserError(f"--engine {engine!r} is not one of {', '.join(known)} on {plan.cluster.describe()}")
    return replace(plan, candidates=kept)


def require_fit(plan: Plan) -> Candidate:
    """The recommended candidate.

    Raises:
        UserError: if nothing fits; the message says by how much, and what would help.
    """
    if plan.recommended is not None:
        return plan.recommended
    smallest = min(plan.candidates, key=lambda candidate: candidate.memory.device)
    raise UserError(
        f"nothing fits {plan.cluster.describe()}: the smallest setting ({smallest.setting.name}, micro batch "
        f"{smallest.setting.micro_batch}) needs {smallest.memory.device / 1e9:.1f} GB a GPU of "
        f"{usable(plan.cluster.gpu) / 1e9:.1f}; use more or larger GPUs, a smaller data.block_size, "
        "or qat.trainable=scales"
    )


def usable(gpu: Gpu) -> float:
    """Bytes of a GPU that a plan may fill."""
    return gpu.memory * (1 - HEADROOM)


def _complexity(setting: Setting) -> tuple[int, int, int]:
    """No offloading before some, a teacher in the process before a cache on disk, plain before sharded."""
    return (int(setting.offload != "none"), int(setting.teacher == "cached"), ENGINES.index(setting.engine))


def _candidate(
    recipe: Recipe,
    shape: ModelShape,
    cluster: Cluster,
    setting: Setting,
    assumptions: Assumptions,
    speed: SpeedAssumptions,
) -> Candidate:
    needs = memory(recipe, shape, cluster, setting, assumptions)
    step = step_time(recipe, shape, cluster, setting, speed)
    why_not = _why_not(needs, cluster)
    steps = recipe.qat.tokens / step_tokens(recipe, cluster)
    hours = steps * step.seconds / 3600 + _cache_hours(recipe, shape, cluster, setting, speed)
    return Candidate(
        setting=setting,
        memory=needs,
        fits=not why_not,
        why_not=why_not,
        step=step,
        tokens_per_second=step.tokens / step.seconds,
        hours=hours,
        cost=hours * cluster.world * cluster.price,
    )


def _why_not(needs: Memory, cluster: Cluster) -> str:
    limit = usable(cluster.gpu)
    processes = cluster.gpus if cluster.gpu.is_cpu else 1
    if needs.device * processes > limit:
        return f"{needs.device * processes / 1e9:.1f} GB of {limit / 1e9:.1f}"
    if not cluster.gpu.is_cpu and needs.host * cluster.gpus > cluster.host_memory * (1 - HEADROOM):
        return f"{needs.host * cluster.gpus / 1e9:.0f} GB main memory of {cluster.host_memory / 1e9:.0f}"
    return ""


def _cache_hours(
    recipe: Recipe, shape: ModelShape, cluster: Cluster, setting: Setting, speed: SpeedAssumptions
) -> float:
    """Writing the teacher's logits: one forward pass over the tokens, if the recipe names no cache."""
    if setting.teacher != "cached" or recipe.qat.distillation.cache is not None:
        return 0.0
    forward = flops_per_token(shape, recipe.data.block_size, setting) / (3 + int(setting.checkpointing))
    rate = speed.rate(cluster.gpu, shape.hidden, compute_bytes(recipe, cluster))
    traffic = (
        shape.layers
        * saved_bytes_per_token(recipe, shape, cluster)
        / (cluster.gpu.bandwidth * speed.bandwidth_efficiency)
    )
    return recipe.qat.tokens * (forward / rate + traffic / 2) / cluster.world / 3600
