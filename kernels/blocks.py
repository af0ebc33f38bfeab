"""A tensor as its blocks: whatever the granularity, `[blocks, elements per block]` with one scale a block."""

from __future__ import annotations

import torch

from qatapult.kernels.scheme import Scheme


def as_blocks(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` as `[scale.numel(), elements per scale]`: a view where `x` is contiguous."""
    return x.reshape(scale.numel(), -1 if x.numel() else 0)


def as_columns(scale: torch.Tensor, zero_point: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and integer zero points as fp32 `[blocks, 1]`: a learned zero point is a real number, rounded
    in use."""
    step = scale.float().reshape(-1, 1)
    return step, torch.zeros_like(step) if zero_point is None else zero_point.float().reshape(-1, 1).round()


def check_scale(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> None:
    """Refuse scales and zero points that do not belong to a tensor of the shape of `x` under `scheme`.

    Raises:
        ValueError: naming the shape that would be right.
    """
    expected = scheme.scale_shape(tuple(x.shape)) if x.ndim else (1,)
    scalar = scheme.granularity == "tensor" and scale.numel() == 1
    if tuple(scale.shape) != expected and not scalar:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not go with a tensor of shape {tuple(x.shape)} on "
            f"{scheme.describe()}: its shape would be {expected}"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point of shape {tuple(zero_point.shape)} must have the scale's shape {tuple(scale.shape)}"
        )
    if zero_point is not None and scheme.symmetric:
        raise ValueError(f"zero_point given for the symmetric {scheme.describe()}; set symmetric=False")
