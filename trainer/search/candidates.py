"""The grids that a search chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe, TensorScheme
from qatapult.trainer.search.groups import Group

_SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Candidate:
    """A grid for weights, and its short name (`4`, `8`, `4:g32`)."""

    name: str
    scheme: TensorScheme

    def bits(self, group: Group) -> float:
        """Bits that a group's weights take on this grid, scales and zero points included."""
        scheme = self.scheme.scheme
        scales = 0
        for shape in group.shapes:
            rows, blocks = (*scheme.scale_shape(shape), 1)[:2]
            scales += rows * blocks
        overhead = _SCALE_BITS[scheme.scale_dtype] + (0 if scheme.symmetric else scheme.storage_bits)
        return scheme.storage_bits * group.weights + overhead * scales


def parse_candidates(texts: Sequence[str], recipe: Recipe) -> list[Candidate]:
    """Candidates from `4`, `8`, `4:g32`, `3:channel`; everything unsaid is as in the recipe's weight grid.

    The recipe's own grid is always among them: it is what all others are measured against.

    Raises:
        UserError: for a grid that does not exist, or a recipe that quantizes no weights.
    """
    base = recipe.quantization.weights
    if base is None:
        raise UserError(
            "quantization.weights is null: a search needs the grid of the other layers to start from"
        )
    found = {describe(base): base}
    for text in texts:
        scheme = _parse(text.strip(), base)
        found.setdefault(describe(scheme), scheme)
    return [Candidate(name, scheme) for name, scheme in found.items()]


def describe(scheme: TensorScheme) -> str:
    """`4:g32`, `8:channel`."""
    where = f"g{scheme.group_size}" if scheme.granularity == "group" else scheme.granularity
    return f"{scheme.bits:g}:{where}"


def _parse(text: str, base: TensorScheme) -> TensorScheme:
    number, _, where = text.partition(":")
    fields = base.model_dump()
    try:
        fields["bits"] = float(number)
    except ValueError:
        raise UserError(f"candidate {text!r} is not BITS or BITS:GRANULARITY, such as 8 or 4:g32") from None
    if where.startswith("g") and where[1:].isdigit():
        fields |= {"granularity": "group", "group_size": int(where[1:])}
    elif where:
        fields |= {"granularity": where, "group_size": None}
    if fields["bits"] > 2:
        fields["grid"] = "integer"
    if fields["bits"] == 8 and fields["range"] == "mse":
        fields["range"] = "minmax"  # with 256 levels there is nothing to search for
    try:
        return TensorScheme.model_validate(fields)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"candidate {text!r}: {message}") from None
