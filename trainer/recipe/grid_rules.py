"""Which grids suit which tensors: weights, inputs of linears, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import TensorScheme


def check_weight_grid(name: str, grid: TensorScheme) -> None:
    """Refuse grids that weights do not have.

    Raises:
        ValueError: naming the field and what would be right.
    """
    if grid.granularity == "token":
        raise ValueError(f"{name}.granularity 'token' is for activations; use 'channel' or 'group'")
    if grid.bits < 2 and grid.range == "minmax":
        raise ValueError(
            f"{name}.range 'minmax' puts the outer levels of {grid.bits:g} bits at the largest weight and nearly "
            "all others at none; use 'absmean' or 'mse'"
        )
    if grid.bits >= 2 and grid.range == "absmean":
        raise ValueError(
            f"{name}.range 'absmean' puts the outermost level at the mean magnitude, which is for ternary and "
            "binary weights; use 'minmax' or 'mse'"
        )


def check_input_grid(name: str, grid: TensorScheme) -> None:
    """Refuse grids that the inputs of linears do not have.

    Raises:
        ValueError: naming the field and what would be right.
    """
    if grid.granularity in ("channel", "group"):
        raise ValueError(f"{name}.granularity '{grid.granularity}' is for weights; use 'token'")
    if grid.granularity == "tensor" or not grid.symmetric:
        kind = "asymmetric" if grid.granularity == "token" else "tensor"
        raise ValueError(
            f"{name}: no integer product takes inputs quantized '{kind}'; use granularity 'token', symmetric"
        )
    if grid.bits < 4:
        raise ValueError(f"{name}.bits {grid.bits:g} is not supported; use 8 or 4")
    if grid.range == "absmean":
        raise ValueError(f"{name}.range 'absmean' is for ternary and binary weights; use 'minmax'")


def check_kv_cache_grid(grid: TensorScheme) -> None:
    """Refuse grids that keys and values do not have.

    Raises:
        ValueError: naming the field and what would be right.
    """
    if grid.granularity != "token":
        raise ValueError(f"kv_cache.granularity '{grid.granularity}' must be 'token'")
    if grid.bits < 2 or grid.grid != "integer":
        raise ValueError("kv_cache needs an integer grid of 8, 4, 3 or 2 bits")
    if grid.range == "absmean":
        raise ValueError("kv_cache.range 'absmean' is for ternary and binary weights; use 'minmax'")
