"""The models of a run, or of any checkpoint folder, ready to be measured or to write text."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatapult.trainer.context import Context
from qatapult.trainer.data.blocks import TokenizedData, load_data
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model, Recipe
from qatapult.trainer.run_folder import RunFolder

Which = Literal["full_precision", "ptq", "qat", "packed"]
#: The stage whose file each model needs.
_STAGE: dict[str, str | None] = {"full_precision": None, "ptq": "ptq", "qat": "qat", "packed": "qat"}


class Models(Protocol):
    """Where models, their tokenizer and held-out text come from."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all of them."""

    @property
    def data(self) -> TokenizedData:
        """Held-out text."""

    @property
    def recipe(self) -> Recipe:
        """What is known of how they came about; a recipe of defaults for a bare folder."""

    @property
    def name(self) -> str:
        """For people."""

    def load(self, which: str) -> PreTrainedModel:
        """A model on its device, in evaluation mode."""


def open_models(path: Path) -> Models:
    """Open a run's folder, or a Hugging Face folder such as an export.

    Raises:
        UserError: if it is neither.
    """
    if (path / "recipe.yaml").is_file():
        return RunModels(path)
    if (path / "config.json").is_file():
        return FolderModels(path)
    raise UserError(f"{str(path)!r} is neither a run (no recipe.yaml) nor a model folder (no config.json)")


@dataclass
class RunModels:
    """The models of a run."""

    path: Path

    @cached_property
    def context(self) -> Context:
        """The run, without its trackers."""
        from qatapult.trainer.console import Console
        from qatapult.trainer.loop.engine import create_accelerator
        from qatapult.trainer.recipe.loading import load_recipe
        from qatapult.trainer.tracking.trackers import Tracking

        folder = RunFolder(self.path)
        recipe = load_recipe(folder.recipe, ["tracking.trackers=[]"])
        accelerator = create_accelerator(recipe)
        console = Console(quiet=True, as_json=True)
        return Context(recipe, folder, accelerator, console, Tracking(accelerator, recipe, folder))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.context.tokenizer

    @property
    def data(self) -> TokenizedData:
        return self.context.data

    @property
    def recipe(self) -> Recipe:
        return self.context.recipe

    @property
    def name(self) -> str:
        return self.path.name

    def load(self, which: str) -> PreTrainedModel:
        """Load one of the run's models.

        Args:
            which: `full_precision`, `ptq` (what training started from), `qat` (fake-quantized) or `packed`.

        Raises:
            UserError: for another name, or if the run has not got that far.
        """
        from qatapult.trainer.quantize.convert import convert
        from qatapult.trainer.quantize.serve import serve
        from qatapult.trainer.stages import ptq, training

        if which not in get_args(Which):
            raise UserError(f"--model {which!r} is not one of {', '.join(get_args(Which))}")
        stage = _STAGE[which]
        if stage is not None and not (self.context.run.artifact(stage) / "model.safetensors").exists():
            raise UserError(f"{self.path} has no {which} model yet: its stage {stage!r} is not finished")
        if which == "full_precision":
            return self.context.load_model().eval()
        if which == "ptq":
            return ptq.load_quantized(self.context).eval()
        trained = training.load_trained(self.context)
        if which == "qat":
            return trained
        packed = convert(trained, in_place=True)
        assert isinstance(packed, PreTrainedModel)
        return serve(packed)


@dataclass
class FolderModels:
    """The one model of a Hugging Face folder, as stock transformers loads it."""

    path: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._model)

    @cached_property
    def data(self) -> TokenizedData:
        return load_data(self.recipe, self.tokenizer)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(name="folder", model=self._model)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def _model(self) -> Model:
        return Model(source=str(self.path))

    def load(self, which: str) -> PreTrainedModel:
        """Load the model; there is only one, whatever is asked for."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors' own progress bars
            model = load_model(self._model, dtype=torch.float32).to(device)  # type: ignore[arg-type]
            # Compressed weights are unpacked by the first call of the whole model.
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
        return model
