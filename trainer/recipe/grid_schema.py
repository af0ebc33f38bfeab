"""The recipe's integer grids: one kind of tensor's, and exceptions by layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qatapult.kernels.scheme import Granularity, Grid, RangeMethod, ScaleDtype, Scheme
from qatapult.trainer.recipe.sections import Section


class TensorScheme(Section):
    """The integer grid of one kind of tensor."""

    bits: float = Field(description="8, 4, 3, 2, 1.58 (ternary) or 1 (binary).")
    granularity: Granularity = Field("channel", description="`tensor`, `channel`, `group` or `token`.")
    group_size: int | None = Field(
        None, description="Neighbours that share a scale, with granularity `group`."
    )
    symmetric: bool = Field(True, description="No zero point.")
    grid: Grid = Field(
        "integer", description="`integer`, or `stretched` (levels at half-integers) for 2 bits and less."
    )
    range: RangeMethod = Field(
        "minmax", description="How a scale is chosen: `minmax`, `mse`, `percentile`, `absmean`."
    )
    percentile: float = Field(
        0.999, description="Share of magnitudes inside the range, for range `percentile`."
    )
    scale_dtype: ScaleDtype = Field("float32", description="The dtype in which the deployment stores scales.")

    @property
    def scheme(self) -> Scheme:
        """The grid in the kernels' terms."""
        return Scheme(
            bits=self.bits,
            granularity=self.granularity,
            group_size=self.group_size,
            symmetric=self.symmetric,
            grid=self.grid,
            range_method=self.range,
            percentile=self.percentile,
            scale_dtype=self.scale_dtype,
        )

    @model_validator(mode="after")
    def _is_a_grid(self) -> TensorScheme:
        _ = self.scheme
        return self


class Override(Section):
    """Another grid for the layers whose names match; the last match wins."""

    match: str = Field(description="Shell pattern over module names, such as `model.layers.*.mlp.down_proj`.")
    weights: TensorScheme | None = Field(
        None, description="Their weights' grid; absent means full precision."
    )
    activations: TensorScheme | Literal["same"] | None = Field(
        "same", description="Their inputs' grid; `same` keeps the recipe's."
    )
