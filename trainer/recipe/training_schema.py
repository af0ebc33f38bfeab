"""The recipe's training: loss, schedules, optimizer, stages and guards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from qatapult.trainer.recipe.data_schema import DataSource
from qatapult.trainer.recipe.grid_rules import check_weight_grid
from qatapult.trainer.recipe.grid_schema import TensorScheme
from qatapult.trainer.recipe.sections import (
    BatchSize,
    Decay,
    Fraction,
    Positive,
    PositiveFloat,
    Section,
)

LayerPairs = Literal["auto"] | tuple[tuple[int, int], ...]


class HiddenLoss(Section):
    """Hidden states against the teacher's, layer by layer, beside the divergence of the logits."""

    weight: float = Field(1.0, gt=0, description="Factor of this loss in the sum.")
    pairs: LayerPairs = Field(
        "auto",
        description="`[[student layer, teacher layer], …]`, from 0, the outputs of which are compared; `auto` "
        "takes every layer of the student and spreads the teacher's evenly over them.",
    )
    loss: Literal["mse", "cosine"] = Field(
        "mse", description="Squared distance, or one minus the cosine of the angle."
    )
    normalize: bool = Field(
        True, description="Divide a token's squared distance by the teacher's mean square of that token."
    )


Relation = Literal["query", "key", "value"]


class AttentionLoss(Section):
    """Self-attention relations against the teacher's (MiniLMv2, arXiv:2012.15828); no attention map is held."""

    weight: float = Field(1.0, gt=0, description="Factor of this loss in the sum.")
    pairs: LayerPairs | Literal["last"] = Field(
        "last",
        description="As for hidden states; `last` is the last layer of both, `auto` every layer of the student.",
    )
    relations: tuple[Relation, ...] = Field(
        ("query", "key", "value"), min_length=1, description="Which projections are related to themselves."
    )
    heads: Positive | None = Field(
        None,
        description="Heads that a projection is cut into; by default the student's key and value heads. Must divide "
        "the width of each projection, the teacher's too.",
    )


class Distillation(Section):
    """What the student is trained against."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "none"] = Field(
        "forward_kl",
        description="Divergence from the teacher's distribution; `none` trains on the text alone.",
    )
    temperature: float = Field(1.0, gt=0, description="Softens both distributions.")
    beta: Fraction = Field(0.5, description="Mixing weight of the generalized Jensen-Shannon divergence.")
    cross_entropy: Fraction = Field(0.0, description="Weight of the next-token loss mixed in.")
    teacher: str | None = Field(
        None,
        description="Another model to distil from (same tokenizer); by default the full-precision model.",
    )
    cache: str | None = Field(None, description="Folder of cached teacher logits; then no teacher is loaded.")
    hidden: HiddenLoss | None = Field(
        None, description="Also compare hidden states of layers; none if absent."
    )
    attention: AttentionLoss | None = Field(
        None, description="Also compare self-attention relations of layers; none if absent."
    )


class Phase(Section):
    """One phase of a progressive schedule."""

    weights: TensorScheme = Field(description="The weights' grid in this phase.")
    fraction: float = Field(gt=0, le=1, description="Share of the run's tokens.")

    @field_validator("weights")
    @classmethod
    def _is_for_weights(cls, value: TensorScheme) -> TensorScheme:
        check_weight_grid("weights", value)
        return value


class Schedule(Section):
    """When what is quantized."""

    phases: tuple[Phase, ...] = Field(
        (), description="Progressive quantization; the last phase is the target."
    )
    weights_start: Fraction = Field(0.0, description="Share of the tokens before weights are quantized.")
    activations_start: Fraction = Field(
        0.0, description="Share of the tokens before activations are quantized."
    )

    @model_validator(mode="after")
    def _fractions_add_up(self) -> Schedule:
        if self.phases and abs(sum(phase.fraction for phase in self.phases) - 1) > 1e-6:
            total = sum(phase.fraction for phase in self.phases)
            raise ValueError(f"phases: the fractions add up to {total:g}; they must add up to 1")
        return self


class Optimizer(Section):
    """AdamW, with a learning rate of its own for scales."""

    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Peak rate of the weights; `auto` scales with bits and with the number of steps."
    )
    scale_learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Peak rate of scales and zero points, relative to each scale's size."
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay of the weights; scales have none."
    )
    warmup: Fraction = Field(0.05, description="Share of the steps with a rising rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the rate falls.")
    final: Fraction = Field(0.0, description="Last rate, as a share of the peak.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")


class Task(Section):
    """A second stage after recovery: fine-tuning for a task, on text of its own."""

    data: list[DataSource] = Field(min_length=1, description="The task's text, as `data.train`.")
    held_out: DataSource | None = Field(
        None, description="The task's held-out text; by default a share of its documents, as for `data`."
    )
    tokens: Positive = Field(description="Length of the stage in tokens, all processes together.")
    cross_entropy: float = Field(
        0.5, gt=0, le=1, description="Share of the next-token loss; the rest stays with the teacher."
    )
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Peak rate of the weights; `auto` is a third of the first stage's."
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value


class Guards(Section):
    """What happens when training goes wrong."""

    max_skipped_steps: Positive = Field(
        3, description="Steps in a row with NaN or inf before the run rolls back."
    )
    max_rollbacks: Positive = Field(3, description="Rollbacks before the run stops.")
    rollback_learning_rate: float = Field(0.5, gt=0, le=1, description="Factor on the rate at each rollback.")
    hang_timeout: Positive = Field(
        1800, description="Seconds without a step before the watchdog names the rank."
    )


class Checkpoints(Section):
    """What is kept, and how often."""

    every_tokens: Positive | None = Field(
        None, description="Tokens between checkpoints; by default at evaluations."
    )
    every_seconds: Positive = Field(600, description="Longest time between checkpoints.")
    keep: Positive = Field(2, description="Newest checkpoints to keep, besides the best.")
    asynchronous: bool | Literal["auto"] = Field(
        "auto",
        description="Write from a copy in main memory while training goes on; `auto` does so for GPUs.",
    )


QatMethod = Literal["lsq", "lsq+", "minmax", "pact", "seq", "ternary", "binary"]
Trainable = Literal["all", "linears", "scales", "lora"]


class Qat(Section):
    """Quantization-aware training."""

    method: QatMethod = Field(
        "lsq", description="How scales come about: learned (LSQ), or from the weights each step."
    )
    trainable: Trainable = Field(
        "linears",
        description="`linears` (with their scales), `all` (embeddings and norms too), `scales`, or `lora`.",
    )
    tokens: Positive = Field(61_440, description="Training length in tokens, all processes together.")
    batch_size: BatchSize = Field(
        2,
        description="Blocks a process computes at a time; `auto` is the most that fit into memory by the plan's "
        "model, and needs `global_batch_tokens`.",
    )
    global_batch_tokens: Positive | None = Field(
        None,
        description="Tokens an optimizer step, all processes together; by default one batch of one process.",
    )
    distillation: Distillation = Field(Distillation(), description="The loss.")
    optimizer: Optimizer = Field(Optimizer(), description="The optimizer.")
    schedule: Schedule = Field(Schedule(), description="Delayed or progressive quantization.")
    blockwise_tokens: int = Field(
        0,
        ge=0,
        description="Tokens for a first phase that trains block by block against the teacher's blocks.",
    )
    blockwise_offload: bool = Field(
        False,
        description="Keep blocks and activations of the block-wise phase on disk, in the run's folder, and one block "
        "in memory: slower, resumed at the block where it stopped.",
    )
    lora_rank: Positive = Field(16, description="Rank of the adapters, for trainable `lora`.")
    integer_forward: bool | Literal["auto"] = Field(
        "auto", description="Multiply integer codes in the training forward pass; `auto` where it is faster."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Autocast dtype; `auto` is bf16 where the hardware multiplies it, else fp32."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    evaluate_every_tokens: Positive | None = Field(
        None, description="Tokens between points of the recovery curve; by default a sixth of the run."
    )
    early_stopping: Positive | None = Field(
        None, description="Stop after so many evaluations without a better held-out perplexity."
    )
    task: Task | None = Field(
        None, description="Fine-tune for a task once the loss of quantization is recovered; none if absent."
    )
    guards: Guards = Field(Guards(), description="NaN, rollback and hang handling.")
    checkpoints: Checkpoints = Field(Checkpoints(), description="Checkpoint policy.")
    control: bool = Field(
        False, description="Also fine-tune the full-precision model on the same tokens, as the fair control."
    )
