"""How the operators run on DTensors: whole blocks stay together, so every rank works on its own rows."""

from __future__ import annotations

import functools
from typing import Any

import torch


def accept_dtensor(x: torch.Tensor) -> None:
    """If `x` is a DTensor, see to it that the operators take it. The import is slow, so not before."""
    if type(x).__name__ == "DTensor":
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.qatapult
    Placements = list[Placement | None]

    def strategies(x: Any, scale: Any, zero_point: Any) -> list[tuple[Placement, Placement]]:
        """Placements of `x` and of its scales that belong together."""
        together: list[tuple[Placement, Placement]] = [(Replicate(), Replicate())]
        for dim in range(x.ndim - 1):
            shares = scale.shape[0] == 1 and scale.ndim == 1
            together.append((Shard(dim), Replicate() if shares else Shard(dim)))
        return together

    def blocks(scale: Placement, zero_point: Any) -> Placements:
        return [scale, None if zero_point is None else scale]

    @register_sharding([ops.fake_quantize.default, ops.quantize.default])
    def forward(x: Any, scale: Any, zero_point: Any, *numbers: Any) -> list[tuple[Placements, Placements]]:
        return [
            ([own], [own, *blocks(share, zero_point), *(None for _ in numbers)])
            for own, share in strategies(x, scale, zero_point)
        ]

    @register_sharding(ops.fake_quantize_backward.default)
    def backward(
        grad: Any, x: Any, scale: Any, zero_point: Any, *numbers: Any
    ) -> list[tuple[Placements, Placements]]:
        acceptable = []
        for own, share in strategies(x, scale, zero_point):
            # One scale for all ranks: each has the sum over its own elements.
            sums: Placement = Partial() if isinstance(share, Replicate) and isinstance(own, Shard) else share
            present = (numbers[3] != "ste", numbers[3] != "ste" and zero_point is not None)
            outputs: Placements = [own, *(sums if exists else Replicate() for exists in present)]
            inputs: Placements = [own, own, *blocks(share, zero_point), *(None for _ in numbers)]
            acceptable.append((outputs, inputs))
        return acceptable
