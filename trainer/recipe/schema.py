"""The typed recipe: what a run does, never where it runs.

No field names an engine, a node or a GPU: those belong to the Accelerate config and to the cluster profile.
Every field's description is the text of the generated reference page (`docs/reference/recipe.md`). The parts lie in
`data_schema`, `grid_schema` and `training_schema`; everything is imported from here.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from qatapult.trainer.recipe import deployment as formats
from qatapult.trainer.recipe.combinations import check_combination
from qatapult.trainer.recipe.data_schema import (
    Data,
    DataSource,
    Model,
)
from qatapult.trainer.recipe.grid_rules import check_input_grid, check_kv_cache_grid, check_weight_grid
from qatapult.trainer.recipe.grid_schema import (
    Override,
    TensorScheme,
)
from qatapult.trainer.recipe.sections import (
    AUTO,
    BatchSize,
    Decay,
    Fraction,
    Positive,
    PositiveFloat,
    Section,
)
from qatapult.trainer.recipe.training_schema import (
    AttentionLoss,
    Checkpoints,
    Distillation,
    Guards,
    HiddenLoss,
    LayerPairs,
    Optimizer,
    Phase,
    Qat,
    QatMethod,
    Relation,
    Schedule,
    Task,
    Trainable,
)

__all__ = [
    "AUTO",
    "AttentionLoss",
    "BatchSize",
    "Calibration",
    "Checkpoints",
    "Data",
    "DataSource",
    "Decay",
    "Deployment",
    "Distillation",
    "Evaluation",
    "ExportFormat",
    "Fraction",
    "Guards",
    "HiddenLoss",
    "LayerPairs",
    "Model",
    "Optimizer",
    "Override",
    "Phase",
    "Positive",
    "PositiveFloat",
    "Ptq",
    "PtqMethod",
    "Qat",
    "QatMethod",
    "Quantization",
    "Recipe",
    "Relation",
    "Schedule",
    "Section",
    "Task",
    "TensorScheme",
    "Tracking",
    "Trainable",
]

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
