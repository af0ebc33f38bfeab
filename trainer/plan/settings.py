"""The choices a plan compares: engine, offloading, recomputing, micro batch, and where the teacher lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from qatapult.trainer.plan.hardware import Cluster
from qatapult.trainer.recipe.schema import Recipe

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "optimizer", "parameters"]
Teacher = Literal["none", "whole", "sharded", "cached"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Setting:
    """One way to run a recipe on a cluster.

    Attributes:
        engine: who shards what: nothing (`single`, `ddp`), the optimizer (`zero1`), also gradients
            (`zero2`), also weights (`zero3`, `fsdp2`).
        offload: what lives in main memory: nothing, optimizer states, or weights and optimizer states.
        checkpointing: recompute activations in the backward pass.
        micro_batch: blocks a process computes at a time.
        teacher: `whole` on every rank, `sharded` like the student, `cached` logits on disk, or `none`.
    """

    engine: Engine
    offload: Offload
    checkpointing: bool
    micro_batch: int
    teacher: Teacher

    @property
    def name(self) -> str:
        """`zero3 + optimizer offload`."""
        return self.engine if self.offload == "none" else f"{self.engine} + {self.offload} offload"

    @property
    def shards_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        return self.engine in ("zero2", "zero3", "fsdp2")

    @property
    def shards_optimizer(self) -> bool:
        return self.engine in ("zero1", "zero2", "zero3", "fsdp2")


def settings(recipe: Recipe, cluster: Cluster) -> Iterator[Setting]:
    """Every sensible setting for a recipe on a cluster, simple ones first."""
    largest = largest_micro_batch(recipe, cluster)
    micro_batches = [size for size in _MICRO_BATCHES if size <= largest]
    for engine, offload in _engines(cluster):
        if engine.startswith("zero") and recipe.qat.precision == "fp16":
            continue  # refused by the trainer
        for teacher in _teachers(recipe, engine):
            for checkpointing in (False, True):
                for micro_batch in micro_batches:
                    yield Setting(engine, offload, checkpointing, micro_batch, teacher)


def step_tokens(recipe: Recipe, cluster: Cluster) -> int:
    """Tokens an optimizer step: the recipe's, or more where a block a process is more than that."""
    asked = recipe.qat.global_batch_tokens or recipe.qat.batch_size * recipe.data.block_size
    return max(asked, cluster.world * recipe.data.block_size)


def largest_micro_batch(recipe: Recipe, cluster: Cluster) -> int:
    """Blocks a process gets in one optimizer step."""
    return max(1, step_tokens(recipe, cluster) // (cluster.world * recipe.data.block_size))


def micro_steps(recipe: Recipe, cluster: Cluster, setting: Setting) -> int:
    """Forward and backward passes of an optimizer step on each process."""
    return -(-largest_micro_batch(recipe, cluster) // setting.micro_batch)


def _engines(cluster: Cluster) -> list[tuple[Engine, Offload]]:
    if cluster.world == 1:
        alone: list[tuple[Engine, Offload]] = [("single", "none")]
        return alone if cluster.gpu.is_cpu else [*alone, ("zero2", "optimizer"), ("zero3", "parameters")]
    plain: list[tuple[Engine, Offload]] = [(engine, "none") for engine in ENGINES if engine != "single"]
    if cluster.gpu.is_cpu:
        return plain
    return [
        *plain,
        ("zero2", "optimizer"),
        ("zero3", "optimizer"),
        ("zero3", "parameters"),
        ("fsdp2", "parameters"),
    ]


def _teachers(recipe: Recipe, engine: Engine) -> list[Teacher]:
    distillation = recipe.qat.distillation
    if distillation.kind == "none":
        return ["none"]
    if distillation.cache is not None:
        return ["cached"]
    # A teacher is never replicated whole where the student is sharded.
    return ["sharded" if engine in ("zero3", "fsdp2") else "whole", "cached"]
