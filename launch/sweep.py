"""Sweeps: one file that names a recipe and the values to try, and becomes one run for every combination."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import describe_validation_error, load_recipe
from qatapult.trainer.recipe.schema import Recipe

_MAX_RUNS = 1000
_MAX_NAME = 100


class Sweep(BaseModel):
    """`sweep.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,59}$", description="Names the sweep; its runs begin with it."
    )
    recipe: str = Field(description="A recipe's file or name, as for `qatapult submit`.")
    at_once: Annotated[int, Field(gt=0)] = Field(4, description="How many runs may compute at the same time.")
    overrides: tuple[str, ...] = Field((), description="`key=value` for every run.")
    parameters: dict[str, list[Any]] = Field(
        min_length=1, description="Values to try, by the recipe's field."
    )
    exclude: tuple[dict[str, Any], ...] = Field((), description="Combinations to leave out.")

    @field_validator("parameters")
    @classmethod
    def _every_parameter_has_values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in value.items():
            if not values:
                raise ValueError(f"parameter {name!r} has no values")
        return value


def load_sweep(file: Path) -> Sweep:
    """Read a sweep.

    Raises:
        UserError: it is not a whole and sensible one.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"sweep {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"sweep {file} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    try:
        return Sweep.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"sweep {file}: {describe_validation_error(error, Sweep)}") from None


def recipes(sweep: Sweep, file: Path, overrides: tuple[str, ...] = ()) -> list[Recipe]:
    """The sweep's runs, all checked.

    Args:
        sweep: the sweep.
        file: where it was read: the recipe may lie beside it.
        overrides: further `key=value` for every run.

    Raises:
        UserError: a combination is not a sensible recipe, or there are too many.
    """
    beside = file.parent / sweep.recipe
    source = beside if beside.is_file() else sweep.recipe
    combinations = [
        combination
        for values in itertools.product(*sweep.parameters.values())
        if not _excluded(combination := dict(zip(sweep.parameters, values, strict=True)), sweep)
    ]
    if not 0 < len(combinations) <= _MAX_RUNS:
        raise UserError(f"sweep {file}: {len(combinations)} runs; there can be 1 to {_MAX_RUNS}")
    found = []
    for number, combination in enumerate(combinations):
        changes = [f"{key}={json.dumps(value)}" for key, value in combination.items()]
        name = f"name={_name(sweep.name, number, combination)}"
        found.append(load_recipe(source, [*sweep.overrides, *overrides, *changes, name]))
    return found


def _excluded(combination: dict[str, Any], sweep: Sweep) -> bool:
    return any(all(combination.get(key) == value for key, value in rule.items()) for rule in sweep.exclude)


def _name(sweep: str, number: int, combination: dict[str, Any]) -> str:
    """`<sweep>-<number>-bits4-methodlsq`: readable, and always different."""
    parts = [
        re.sub(r"[^A-Za-z0-9.+]", "", f"{key.rpartition('.')[2]}{value}")
        for key, value in combination.items()
    ]
    return "-".join([f"{sweep}-{number:03d}", *parts])[:_MAX_NAME].rstrip("-")
