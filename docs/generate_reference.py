"""Write the reference pages that come from the code: recipe fields, and the public functions of the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from qatapult import kernels
from qatapult.trainer.recipe.schema import Recipe

REFERENCE = Path(__file__).parent / "reference"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The recipe section inside an annotation, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, BaseModel):
        return "see below"
    shown = (
        [v.model_dump() if isinstance(v, BaseModel) else v for v in field.default]
        if isinstance(field.default, list | tuple)
        else field.default
    )
    return f"`{shown}`"


def recipe_pages(model: type[BaseModel], path: str, done: set[type[BaseModel]]) -> list[str]:
    """A table for a section and, below it, for the sections in it."""
    lines = [
        f"## `{path}`" if path else "## The recipe",
        "",
        (model.__doc__ or "").strip().splitlines()[0],
        "",
    ]
    lines += ["| field | default | |", "|---|---|---|"]
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        lines.append(f"| `{name}` | {default_of(field)} | {field.description} |".replace("\n", " "))
        section = section_of(field.annotation)
        if section is not None and section not in done:
            done.add(section)
            inner.append((section, f"{path}.{name}" if path else name))
    pages = [*lines, ""]
    for section, where in inner:
        pages += recipe_pages(section, where, done)
    return pages


def main() -> None:
    """Write both pages."""
    REFERENCE.mkdir(exist_ok=True)
    head = ["# Recipe reference", "", "Generated from `trainer/recipe/schema.py` by `make docs`.", ""]
    (REFERENCE / "recipe.md").write_text("\n".join(head + recipe_pages(Recipe, "", set())), encoding="utf-8")
    functions = [f"::: qatapult.kernels.{where}.{name}" for name, where in sorted(kernels._PUBLIC.items())]
    head = ["# Kernels reference", ""]
    (REFERENCE / "kernels.md").write_text("\n\n".join(head + functions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
