"""What the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatapult.launch.owner import Owner
from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import TokenizedData, load_data
from qatapult.trainer.evaluate.perplexity import Perplexity, perplexity
from qatapult.trainer.measure import CostMeter
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.schema import Quantization, Recipe
from qatapult.trainer.run_folder import RunFolder
from qatapult.trainer.tracking.trackers import Tracking


@dataclass
class Context:
    """A run in progress: recipe, folder, engine and terminal; model and data load when first needed.

    `owner` is the main process's right to write into the run.
    """

    recipe: Recipe
    run: RunFolder
    accelerator: Accelerator
    console: Console
    tracking: Tracking
    owner: Owner | None = None
    _full_precision: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        device = self.accelerator.device
        # Accelerate numbers CPUs too, and safetensors knows no `cpu:0`.
        return torch.device("cpu") if device.type == "cpu" else device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def data(self) -> TokenizedData:
        return load_data(self.recipe, self.tokenizer)

    def load_model(self) -> PreTrainedModel:
        """A fresh full-precision model on this process's device."""
        return load_model(self.recipe.model).to(self.device)  # type: ignore[arg-type]

    def load_prepared(self, quantization: Quantization | None = None) -> PreTrainedModel:
        """A fresh model laid on the recipe's grids (or on others)."""
        model = self.load_model()
        prepare(model, quantization or self.recipe.quantization, self.recipe.qat.method)
        return model

    def judge(self, model: PreTrainedModel, description: str) -> dict[str, Any]:
        """The recipe's tasks and sample texts: `{"tasks": …}`, and `"samples"` where the recipe asks for them.

        For models that this process holds whole.
        """
        evaluation = self.recipe.evaluation
        judged: dict[str, Any] = {"tasks": {}}
        if evaluation.tasks:
            from qatapult.trainer.evaluate.tasks import TaskOptions, run_tasks

            self.console.say(f"  {description}: {', '.join(evaluation.tasks)}")
            options = TaskOptions(limit=evaluation.limit, name=description)
            judged["tasks"] = run_tasks(model.eval(), self.tokenizer, evaluation.tasks, options)
        if evaluation.generate:
            from qatapult.trainer.evaluate.samples import sample_texts

            judged["samples"] = sample_texts(
                model.eval(), self.tokenizer, self.data.held_out, evaluation.generate
            )
        return judged

    def meter(self) -> CostMeter:
        """Start measuring a stage's cost."""
        return CostMeter(self.device)

    def perplexity(self, model: PreTrainedModel, description: str) -> Perplexity:
        """Held-out perplexity with progress; for models that this process holds whole."""
        with self.console.progress(self.data.held_out.numel(), description) as meter:
            return perplexity(
                model.eval(), self.data.held_out, self.data.held_out_documents, on_progress=meter.update
            )
