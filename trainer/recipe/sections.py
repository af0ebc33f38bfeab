"""What the sections of a recipe are built from: their base, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

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
