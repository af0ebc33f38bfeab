"""Time of a training step: arithmetic, memory traffic, communication and offloading.

Arithmetic is counted as in Kaplan et al. (arXiv:2001.08361, section 2.1): 2 operations a weight and token
forward, 4 backward, and attention's share; recomputing adds a forward pass, the teacher another.
Communication is that of ring collectives: an all-reduce of B bytes over p ranks moves 2 (p − 1)/p · B over
every link, a reduce-scatter or all-gather half of that (Patarasuk and Yuan, 2009); ZeRO's volumes are those
of arXiv:1910.02054, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

from qatapult.trainer.plan.hardware import Cluster, Gpu
from qatapult.trainer.plan.memory import (
    FP32,
    compute_bytes,
    saved_bytes_per_token,
    trained_parameters,
)
from qatapult.trainer.plan.model_shape import ModelShape
from qatapult.trainer.plan.settings import Setting, micro_steps, step_tokens
from qatapult.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class SpeedAssumptions:
    """Constants of the time model that calibration may replace.

    Attributes:
        efficiency: share of the peak rate that large matrix products reach.
        efficient_hidden: hidden size at which half of that is reached; smaller models use matrices that are
            too small.
        bandwidth_efficiency: share of the memory's peak bandwidth that element-wise kernels reach.
        overlap: share of gradient and weight communication that hides behind arithmetic.
        link_efficiency: share of a link's peak that collectives reach.
        cpu_adam_bytes: bytes of main memory that the CPU's AdamW moves a weight.
        step_overhead: seconds a micro step that no rate explains (launches, data, logging).
    """

    efficiency: float = 0.55
    efficient_hidden: int = 600
    bandwidth_efficiency: float = 0.75
    overlap: float = 0.7
    link_efficiency: float = 0.7
    cpu_adam_bytes: float = 28.0
    step_overhead: float = 0.004

    def rate(self, gpu: Gpu, hidden: int, compute: int) -> float:
        """Operations a second of products at this hidden size, in `compute` bytes an element."""
        if gpu.is_cpu:
            return gpu.flops * self.efficiency
        peak = gpu.flops / 2 if compute == FP32 else gpu.flops  # TF32 runs at half of the bf16 rate
        return peak * self.efficiency * hidden / (hidden + self.efficient_hidden)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by cause; `communication` is what arithmetic does not hide."""

    arithmetic: float
    elementwise: float
    communication: float
    offload: float
    optimizer: float
    overhead: float
    micro_steps: int
    tokens: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return (
            self.arithmetic
            + self.elementwise
            + self.communication
            + self.offload
            + self.optimizer
            + self.overhead
        )


def flops_per_token(shape: ModelShape, block_size: int, setting: Setting) -> float:
    """Operations a trained token, student and in-process teacher together."""
    weights = shape.linear_parameters + shape.head_parameters
    attention = (
        shape.layers * 2 * block_size * shape.query_width
    )  # scores and values, half of them masked out
    forward = 2 * weights + attention
    passes = 3 + int(setting.checkpointing) + int(setting.teacher in ("whole", "sharded"))
    return passes * forward


def step_time(
    recipe: Recipe,
    shape: ModelShape,
    cluster: Cluster,
    setting: Setting,
    given: SpeedAssumptions | None = None,
) -> StepTime:
    """Seconds of one optimizer step on every rank, by cause."""
    given = given or SpeedAssumptions()
    c = compute_bytes(recipe, cluster)
    block = recipe.data.block_size
    tokens = step_tokens(recipe, cluster)
    rank_tokens = tokens / cluster.world
    passes = micro_steps(recipe, cluster, setting)
    rate = given.rate(cluster.gpu, shape.hidden, c)
    arithmetic = rank_tokens * flops_per_token(shape, block, setting) / rate
    bandwidth = cluster.gpu.bandwidth * given.bandwidth_efficiency
    elementwise = _elementwise_bytes(recipe, shape, cluster, setting, rank_tokens, passes) / bandwidth
    trained = trained_parameters(recipe, shape)
    hidden_by = given.overlap * (arithmetic + elementwise)
    moved = _communication_bytes(shape, setting, trained, cluster.world, c, passes)
    communication = moved / (cluster.bus * given.link_efficiency) if cluster.world > 1 else 0.0
    optimizer_shard = trained / (cluster.world if setting.shards_optimizer else 1)
    offload, optimizer = 0.0, optimizer_shard * 28 / bandwidth
    if setting.offload != "none":
        optimizer = optimizer_shard * given.cpu_adam_bytes * cluster.gpus / cluster.host_bandwidth
        offload = optimizer_shard * 2 * FP32 / cluster.gpu.host_link  # gradients down, weights up
    if setting.offload == "parameters":
        gathers = 2 + int(setting.checkpointing)
        offload += passes * gathers * FP32 * shape.parameters / cluster.world / cluster.gpu.host_link
    return StepTime(
        arithmetic=arithmetic,
        elementwise=elementwise,
        communication=max(communication - hidden_by, communication * (1 - given.overlap)),
        offload=offload,
        optimizer=optimizer,
        overhead=given.step_overhead * passes,
        micro_steps=passes,
        tokens=tokens,
    )


def _elementwise_bytes(
    recipe: Recipe,
    shape: ModelShape,
    cluster: Cluster,
    setting: Setting,
    rank_tokens: float,
    micro_steps: int,
) -> float:
    """Bytes moved by all that is no matrix product: each pass reads or writes what is saved about once."""
    c = compute_bytes(recipe, cluster)
    passes = 3 + int(setting.checkpointing) + int(setting.teacher in ("whole", "sharded")) / 2
    saved = saved_bytes_per_token(recipe, shape, cluster)
    fake_quantization = (2 * (FP32 + c) + 2 * FP32) * shape.linear_parameters * micro_steps
    return rank_tokens * shape.layers * saved * passes + fake_quantization


def _communication_bytes(
    shape: ModelShape, setting: Setting, trained: int, p: int, c: int, micro_steps: int
) -> float:
    """Bytes over a rank's link in an optimizer step."""
    if p == 1:
        return 0.0
    ring = (p - 1) / p
    if setting.engine == "ddp":
        return 2 * ring * FP32 * trained
    if setting.engine == "zero1":
        return ring * FP32 * 3 * trained
    if setting.engine == "zero2":
        return ring * FP32 * (micro_steps + 1) * trained
    gathers = 2 + int(setting.checkpointing)
    teacher = c * shape.parameters if setting.teacher == "sharded" else 0
    return ring * micro_steps * (FP32 * (gathers * shape.parameters + trained) + teacher)
