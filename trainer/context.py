"""What the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        return self.accelerator.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def data(self) -> TokenizedData:
        return load_data(self.recipe, self.tokenizer)

    def load_model(self) -> PreTrainedModel:
        """A fresh full-precision model on this process's device."""
        return load_model(self.recipe.model).to(self.device)

    def load_prepared(self, quantization: Quantization | None = None) -> PreTrainedModel:
        """A fresh model laid on the recipe's grids (or on others)."""
        model = self.load_model()
        prepare(model, quantization or self.recipe.quantization, self.recipe.qat.method)
        return model

    def meter(self) -> CostMeter:
        """Start measuring a stage's cost."""
        return CostMeter(self.device)

    def perplexity(self, model: PreTrainedModel, description: str) -> Perplexity:
        """Held-out perplexity with progress; for models that this process holds whole."""
        with self.console.progress(self.data.held_out.numel(), description) as meter:
            return perplexity(
                model.eval(), self.data.held_out, self.data.held_out_documents, on_progress=meter.update
            )
