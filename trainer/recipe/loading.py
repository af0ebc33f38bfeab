"""From a YAML file to a `Recipe`: `extends:`, `key=value` overrides, and errors that name the field."""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe

_MAX_EXTENDS = 10


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe (`smollm2-135m-w4a8`).
        overrides: `key=value` with dots in the key and YAML in the value; they win over the file.

    Raises:
        UserError: for anything that is not a whole and sensible recipe.
    """
    merged = _read_with_parents(_locate(path), depth=0)
    for override in overrides:
        _apply_override(merged, override)
    try:
        data = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation_error(error, Recipe)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every field written out."""
    buffer = io.StringIO()
    yaml.safe_dump(recipe.model_dump(mode="json"), buffer, sort_keys=False, allow_unicode=True)
    return buffer.getvalue()


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("qatapult.configs") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Fields in which two recipes differ, as `field: old → new`."""
    return list(_compare(old.model_dump(mode="json"), new.model_dump(mode="json"), ""))


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one line: field, value, what would be right."""
    # A misspelt field also makes the right one missing: the misspelling explains more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known are {', '.join(known)}"
        return f"unknown field '{where}'; {hint}"
    if first["type"] == "missing":
        return f"field '{where}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, dict | list) or value is None else f" (got {value!r})"
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{where or 'recipe'}: {message}{shown}{more}"


def _locate(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    shipped = Path(str(files("qatapult.configs") / "recipes" / f"{file.name.removesuffix('.yaml')}.yaml"))
    if shipped.is_file() and file.parent in (Path("."), Path("configs/recipes")):
        return shipped
    nearest = difflib.get_close_matches(file.stem, shipped_recipes(), n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; shipped are {', '.join(shipped_recipes())}"
    raise UserError(f"recipe {str(path)!r} does not exist{hint}")


def _read_with_parents(file: Path, depth: int) -> DictConfig:
    if depth > _MAX_EXTENDS:
        raise UserError(f"{file}: 'extends' goes round in a circle or more than {_MAX_EXTENDS} deep")
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{file}: a recipe is a mapping of fields, such as 'name: my-run'")
    parents = loaded.pop("extends", None)
    if parents is None:
        return loaded
    merged = OmegaConf.create({})
    for parent in [parents] if isinstance(parents, str) else parents:
        beside = file.parent / parent
        merged.merge_with(_read_with_parents(beside if beside.is_file() else _locate(parent), depth + 1))
    try:
        merged.merge_with(loaded)
    except TypeError as error:
        raise UserError(f"{file} does not fit what it extends: {_first_line(error)}") from None
    return merged


def _apply_override(recipe: DictConfig, override: str) -> None:
    """Set `key=value`; the value replaces what stood there, sections included."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not key=value, such as qat.tokens=100000")
    try:
        parsed = yaml.safe_load(value) if value else None
        OmegaConf.update(recipe, key.strip(), parsed, merge=False, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {override!r} cannot be applied: {_first_line(error)}") from None


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section that a location of a pydantic error points to."""
    current: Any = model
    for part in location:
        if isinstance(part, int) or not hasattr(current, "model_fields"):
            continue
        field = current.model_fields.get(part)
        if field is None:
            continue
        current = _section_in(field.annotation) or current
    return sorted(current.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _compare(old: Any, new: Any, where: str) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _compare(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where}: {old!r} → {new!r}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
