"""What operators need beyond `torch.library.custom_op`: gradients under `torch.func`, and batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def differentiable(
    operator: Any,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> Callable[..., Any]:
    """Give an operator its gradient, also under the transforms of `torch.func`.

    `register_autograd` alone cannot be transformed: torch builds an old-style function from it. So under
    a transform the call goes through a `torch.autograd.Function` with the same formulas; otherwise straight
    to the operator.

    Args:
        operator: from `torch.library.custom_op`.
        backward: `(ctx, *gradients of outputs) → gradients of inputs`.
        setup_context: `(ctx, inputs, output)`, saves what backward needs.

    Returns:
        The function to call instead of the operator.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    saves, derives = setup_context, backward

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if saves is not None:
                saves(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return derives(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return Transformable.apply(*inputs)
        return operator(*inputs)

    return call


def blocks_batch(operator: Any) -> None:
    """Register how an operator on blocks is vectorised by `torch.vmap`.

    Such operators see their tensors as `[blocks, elements]`, whatever the shape, so a batch is just more
    blocks: the batch dimension goes first in every tensor. An output of one dimension stands for none, and
    has no batch.
    """

    def batched(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        def first(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, torch.Tensor):
                return argument
            return (
                argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            )

        outputs = operator(*map(first, arguments, in_dims))
        if isinstance(outputs, torch.Tensor):
            return outputs, 0
        return outputs, tuple(0 if output.dim() > 1 else None for output in outputs)

    operator.register_vmap(batched)
