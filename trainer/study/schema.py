"""The typed study: which runs answer a question, and which published figures stand beside them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import describe_validation_error

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,39}$")]
Part = Literal["recovery", "curves", "tasks"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(_Part):
    """One row of the study's table: a recipe with something changed, run once a seed."""

    name: Name = Field(description="Names its runs: `<study>-<size>-<name>-s<seed>`.")
    label: str = Field(description="What the table calls it.")
    overrides: tuple[str, ...] = Field((), description="`key=value` on top of the study's.")
    model: str | None = Field(
        None, description="Name of one of the study's `models`, instead of the recipe's."
    )
    brief: str = Field("", description="What the brief that the project starts from claims for it.")
    literature: str = Field("", description="What others measured, with the source.")
    seeds: tuple[int, ...] | None = Field(None, description="Instead of the size's seeds.")
    own_text: bool = Field(
        False, description="Train also on text that the full-precision model wrote: see the size's `writing`."
    )


class Pretraining(_Part):
    """A small model trained from scratch on the study's text before anything is quantized."""

    shape: dict[str, Any] = Field(description="Fields of the LLaMA configuration, such as `hidden_size: 64`.")
    tokens: int = Field(gt=0, description="Length of the training in tokens.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak rate.")


class Writing(_Part):
    """Text that the full-precision model writes, for cells with `own_text`."""

    documents: int = Field(gt=0, description="How many.")
    tokens: int = Field(gt=1, description="Longest document.")


class Size(_Part):
    """How much of everything: `small` ends within minutes on two cores, `full` is for a GPU node."""

    overrides: tuple[str, ...] = Field((), description="`key=value` for every run; a cell's own win.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds that every cell is run with.")
    cells: tuple[Name, ...] | None = Field(None, description="Only these cells; all if absent.")
    model: str | None = Field(None, description="One of `models` for the cells that name none.")
    pretraining_share: float = Field(1.0, gt=0, le=1, description="Share of the pretraining's tokens.")
    writing: Writing | None = Field(None, description="How much text cells with `own_text` get.")


class Study(_Part):
    """`study.yaml`."""

    name: Name = Field(description="Names the study, its folder and its runs.")
    title: str = Field(description="Heading of the page.")
    question: str = Field(description="What the study answers; the page's first paragraph.")
    recipe: str = Field("smollm2-135m-w4a8", description="The recipe that every cell changes.")
    overrides: tuple[str, ...] = Field((), description="`key=value` for every run.")
    models: dict[Name, Pretraining] = Field({}, description="Models trained from scratch, by name.")
    cells: tuple[Cell, ...] = Field(min_length=1, description="The runs.")
    sizes: dict[Literal["small", "full"], Size] = Field(description="`small` and `full`.")
    show: tuple[Part, ...] = Field(("recovery",), description="Parts of the page.")
    notes: tuple[str, ...] = Field((), description="What a reader must know to read the table right.")

    @model_validator(mode="after")
    def _names_fit(self) -> Study:
        names = [cell.name for cell in self.cells]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"cells: {', '.join(sorted(twice))} appears twice")
        for cell in self.cells:
            if cell.model is not None and cell.model not in self.models:
                raise ValueError(
                    f"cells: {cell.name} asks for model '{cell.model}', which `models` does not have"
                )
        for size in self.sizes.values():
            asking = [cell.name for cell in self.cells if cell.own_text]
            if asking and size.writing is None:
                raise ValueError(f"sizes: {asking[0]} asks for own_text, and a size has no `writing`")
            if size.model is not None and size.model not in self.models:
                raise ValueError(f"sizes: there is no model '{size.model}' in `models`")
            unknown = set(size.cells or ()) - set(names)
            if unknown:
                raise ValueError(f"sizes: there is no cell {', '.join(sorted(unknown))}")
        return self

    def chosen(self, size: str) -> tuple[Cell, ...]:
        """The cells of a size, each with the model it uses.

        Raises:
            UserError: if the study has no such size.
        """
        of_size = self.size(size)
        return tuple(
            cell.model_copy(update={"model": cell.model or of_size.model})
            for cell in self.cells
            if of_size.cells is None or cell.name in of_size.cells
        )

    def size(self, size: str) -> Size:
        """A size by its name.

        Raises:
            UserError: if the study has no such size.
        """
        for name, found in self.sizes.items():
            if name == size:
                return found
        raise UserError(f"study {self.name}: there is no size '{size}'; there is {' and '.join(self.sizes)}")


def shipped_studies() -> list[str]:
    """Names of the studies that come with the package."""
    folder = files("qatapult.configs") / "studies"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_study(path: str | Path) -> Study:
    """Read and check a study.

    Args:
        path: a YAML file, or the name of a shipped study (`bits`).

    Raises:
        UserError: if it is not a whole and sensible study.
    """
    file = Path(path)
    if not file.is_file():
        file = Path(str(files("qatapult.configs") / "studies" / f"{file.name.removesuffix('.yaml')}.yaml"))
        if not file.is_file():
            raise UserError(f"study {str(path)!r} does not exist; shipped are {', '.join(shipped_studies())}")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"study {file} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"study {file}: {describe_validation_error(error, Study)}") from None
