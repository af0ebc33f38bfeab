"""The typed recipe: what a run does, never where it runs.

No field names an engine, a node or a GPU: those belong to the Accelerate config and to the cluster profile.
Every field's description is the text of the generated reference page (`docs/reference/recipe.md`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qatapult.kernels.scheme import Granularity, Grid, RangeMethod, ScaleDtype, Scheme
from qatapult.trainer.recipe import deployment as formats
from qatapult.trainer.recipe.combinations import check_combination
from qatapult.trainer.recipe.grid_rules import check_input_grid, check_kv_cache_grid, check_weight_grid

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
#: What `auto` is for fields that are numbers to the program.
AUTO = 0
BatchSize = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(lambda value: _batch_size(value)),
    PlainSerializer(lambda value: "auto" if value == AUTO else value),
]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _batch_size(value: object) -> object:
    if value == "auto":
        return AUTO
    if value == AUTO or isinstance(value, str):
        raise ValueError("must be at least 1, or 'auto'")
    return value


class Section(BaseModel):
    """Base of every part of the recipe: unknown fields are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The checkpoint to quantize."""

    source: str = Field(
        description="A folder in Hugging Face format, a hub id, a `.gguf` file, `package:NAME/FILE` for a file "
        "inside an installed package, or `random:SHAPE` for random weights of a named shape (for tests and "
        "benchmarks; the shapes are listed by `qatapult recipe shapes`)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    tokenizer: str | None = Field(
        None, description="Where the tokenizer comes from, if not from the model's own source."
    )
    allow_pickle: bool = Field(
        False, description="Also read `.bin` weights, which are pickles and can run code."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")


class DataSource(Section):
    """Where documents come from."""

    kind: Literal["cpython_docs", "text", "jsonl", "parquet", "hub", "random"] = Field(
        description="`cpython_docs` (the language reference that every CPython carries), `text` (files; documents "
        "are separated by blank lines or by `separator`), `jsonl`, `parquet`, `hub` (a hub data set), "
        "or `random` (token ids, for benchmarks). `qatapult teacher write` makes JSONL of the teacher's own text."
    )
    path: str | None = Field(None, description="File, folder, glob, or hub data set id.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    field: str = Field("text", description="Column that holds the text (JSONL, Parquet, hub).")
    separator: str | None = Field(
        None, description="What separates documents in a text file; blank lines if absent."
    )
    streaming: bool = Field(
        False,
        description="Read no more of the source than the run needs, the same share of every shard in use.",
    )
    shuffle_buffer: int = Field(
        0,
        ge=0,
        description="Documents in a buffer that shuffles them before they are packed; 0 keeps their order.",
    )
    weight: float = Field(1.0, gt=0, description="Share of this source in a mixture, relative to the others.")
    documents: Positive | None = Field(None, description="Use at most so many documents.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> DataSource:
        needs_path = self.kind in ("text", "jsonl", "parquet", "hub")
        if needs_path and not self.path:
            raise ValueError(f"path is missing: kind '{self.kind}' reads from a path")
        return self


class Data(Section):
    """Text to train on and text to judge by. The split is by document and never changes with the seed."""

    train: list[DataSource] = Field(
        default=[DataSource(kind="cpython_docs")],
        min_length=1,
        description="One source, or a weighted mixture.",
    )
    held_out: DataSource | None = Field(
        None, description="Where held-out documents come from; by default a share of the training documents."
    )
    held_out_every: int = Field(
        8, ge=2, description="The first of every so many documents is held out, in the source's order."
    )
    block_size: int = Field(512, ge=8, description="Tokens a block.")
    evaluation_blocks: Positive = Field(16, description="Held-out blocks that the perplexity is measured on.")
    shuffle: bool = Field(True, description="Shuffle blocks anew in each pass over the data.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the training blocks to use.")
    on_broken_shard: Literal["refuse", "skip"] = Field(
        "refuse", description="What to do with a data shard that cannot be read."
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, dict) else value


class TensorScheme(Section):
    """The integer grid of one kind of tensor."""

    bits: float = Field(description="8, 4, 3, 2, 1.58 (ternary) or 1 (binary).")
    granularity: Granularity = Field("channel", description="`tensor`, `channel`, `group` or `token`.")
    group_size: int | None = Field(
        None, description="Neighbours that share a scale, with granularity `group`."
    )
    symmetric: bool = Field(True, description="No zero point.")
    grid: Grid = Field(
        "integer", description="`integer`, or `stretched` (levels at half-integers) for 2 bits and less."
    )
    range: RangeMethod = Field(
        "minmax", description="How a scale is chosen: `minmax`, `mse`, `percentile`, `absmean`."
    )
    percentile: float = Field(
        0.999, description="Share of magnitudes inside the range, for range `percentile`."
    )
    scale_dtype: ScaleDtype = Field("float32", description="The dtype in which the deployment stores scales.")

    @property
    def scheme(self) -> Scheme:
        """The grid in the kernels' terms."""
        return Scheme(
            bits=self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            symmetric=self.symmetric,
            grid=self.grid,
            range_method=self.range,
            percentile=self.percentile,
            scale_dtype=self.scale_dtype,
        )

    @model_validator(mode="after")
    def _is_a_grid(self) -> TensorScheme:
        _ = self.scheme
        return self


class Override(Section):
    """Another grid for the layers whose names match; the last match wins."""

    match: str = Field(description="Shell pattern over module names, such as `model.layers.*.mlp.down_proj`.")
    weights: TensorScheme | None = Field(
        None, description="Their weights' grid; absent means full precision."
    )
    activations: TensorScheme | Literal["same"] | None = Field(
        "same", description="Their inputs' grid; `same` keeps the recipe's."
    )


Deployment = Literal["native", "compressed-tensors", "gguf-q4_0", "gguf-q8_0", "gguf-q4_1", "torchao"]


class Quantization(Section):
    """What is quantized, and onto which grid."""

    weights: TensorScheme | None = Field(
        TensorScheme(bits=4), description="Grid of the weights; `null` leaves them in full precision."
    )
    activations: TensorScheme | None = Field(
        TensorScheme(bits=8, granularity="token"),
        description="Grid of the linears' inputs; `null` for weight-only.",
    )
    kv_cache: TensorScheme | None = Field(None, description="Grid of keys and values, per token and head.")
    embeddings: TensorScheme | None = Field(None, description="Grid of the embedding table.")
    skip: tuple[str, ...] = Field(
        ("lm_head",), description="Shell patterns of modules left in full precision."
    )
    overrides: tuple[Override, ...] = Field(
        (), description="Exceptions by layer, as `qatapult search` writes them."
    )
    deployment: Deployment = Field(
        "native",
        description="Format that the result is served in; its grid is then used from the first step on.",
    )

    @model_validator(mode="before")
    @classmethod
    def _grid_of_the_deployment(cls, data: Any) -> Any:
        return formats.fill_in(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sensible(self) -> Quantization:
        overridden = [override.weights for override in self.overrides]
        for name, grid in (
            ("weights", self.weights),
            ("embeddings", self.embeddings),
            *(("overrides.weights", grid) for grid in overridden),
        ):
            if grid is not None:
                check_weight_grid(name, grid)
        inputs = [o.activations for o in self.overrides if isinstance(o.activations, TensorScheme)]
        for name, grid in (
            ("activations", self.activations),
            *(("overrides.activations", g) for g in inputs),
        ):
            if grid is not None:
                check_input_grid(name, grid)
        if self.kv_cache is not None:
            check_kv_cache_grid(self.kv_cache)
        formats.check(
            self.deployment,
            self.weights.scheme if self.weights else None,
            self.activations.scheme if self.activations else None,
        )
        return self


class Calibration(Section):
    """Text that post-training methods look at."""

    blocks: Positive = Field(
        64, description="Blocks of `data.block_size` tokens, from the training documents."
    )


PtqMethod = Literal["rtn", "mse", "percentile", "gptq", "awq", "smoothquant", "hadamard", "spinquant"]


class Ptq(Section):
    """Post-training quantization: the baseline, and what training starts from."""

    methods: tuple[PtqMethod, ...] = Field(
        ("rtn",), min_length=1, description="Each is measured; round-to-nearest always is."
    )
    initialize_from: PtqMethod | Literal["best"] = Field(
        "best", description="The result that training starts from."
    )
    calibration: Calibration = Field(Calibration(), description="Calibration text.")
    damping: float = Field(
        0.01, gt=0, description="GPTQ: share of the mean Hessian diagonal that is added to it."
    )
    act_order: bool = Field(True, description="GPTQ: columns in falling order of the Hessian's diagonal.")
    smoothing: Fraction = Field(
        0.5, description="SmoothQuant: share of the difficulty moved into the weights."
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


class Evaluation(Section):
    """What the models are judged by."""

    tasks: tuple[str, ...] = Field((), description="lm-eval tasks by name, or folders with task YAML.")
    limit: Positive | None = Field(None, description="Documents a task.")
    bootstrap: Positive = Field(1000, description="Resamples for the recovery's interval.")
    generate: Positive | None = Field(
        None, description="Tokens of sample text in the report; none if absent."
    )


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = Field((), description="Accelerate's trackers.")
    project: str = Field("qatapult", description="wandb project.")
    group: str | None = Field(None, description="wandb group, for sweeps.")
    tags: tuple[str, ...] = Field((), description="wandb tags.")
    upload_checkpoint: bool = Field(False, description="Store the exported checkpoint as a wandb artifact.")


ExportFormat = Literal["compressed-tensors", "gguf", "torchao", "safetensors"]


class Recipe(Section):
    """Everything a run does."""

    name: str = Field(description="Name of the run; its folder is `runs/<name>`.")
    description: str = Field("", description="One line for people.")
    seed: int = Field(0, ge=0, description="Seeds data order and sampling.")
    model: Model = Field(description="The checkpoint.")
    data: Data = Field(Data(), description="Text.")
    quantization: Quantization = Field(Quantization(), description="The integer grid.")
    ptq: Ptq = Field(Ptq(), description="Post-training quantization.")
    qat: Qat = Field(Qat(), description="Quantization-aware training.")
    evaluation: Evaluation = Field(Evaluation(), description="Evaluation.")
    export: tuple[ExportFormat, ...] = Field(("compressed-tensors",), description="Formats to export.")
    tracking: Tracking = Field(Tracking(), description="Experiment trackers.")

    @model_validator(mode="before")
    @classmethod
    def _export_to_the_deployment(cls, data: Any) -> Any:
        quantization = data.get("quantization") if isinstance(data, dict) else None
        named = quantization.get("deployment", "native") if isinstance(quantization, dict) else "native"
        if named == "native" or "export" in data:
            return data
        return data | {"export": [str(named).partition("-q")[0]]}

    @model_validator(mode="after")
    def _method_fits_the_grid(self) -> Recipe:
        check_combination(self)
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str, info: ValidationInfo) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", value):
            raise ValueError("use letters, digits, '.', '_', '+' and '-' only, at most 100 of them")
        return value
