"""Which kernels really ran: a score of another arithmetic than the one that is served is worth nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from qatapult.trainer.quantize.convert import PackedLinear, packed_layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCT = "qatapult::packed_product"


class KernelCounter(TorchDispatchMode):
    """Counts the products of packed weights that torch dispatches, by the arithmetic of their operands.

    It looks at the operator's arguments, not at what a layer says of itself.

    Attributes:
        integer: products with token scales, whose left operand is int8 codes.
        float: products with inputs in floating point.
    """

    def __init__(self) -> None:
        super().__init__()
        self.integer = 0
        self.float = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == _PRODUCT:
            codes: Tensor = args[0]
            if codes.is_floating_point():
                self.float += 1
            else:
                self.integer += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(model: nn.Module, watch: bool = True) -> Iterator[dict[str, Any]]:
    """Count the packed products of everything that runs inside the block.

    Args:
        model: the model that runs; without packed layers all counts are 0.
        watch: count at torch's dispatcher and compare; it costs some time in every operation. Otherwise the
            layers' own counts are taken as they are, and `products` is left out.

    Yields:
        A dictionary that is filled at the end of the block: `linears`, how many packed layers there are;
        `integer`, how many of them multiplied integers; `by_kind`, layers that ran by arithmetic, such as
        `{"int4 × int8": 210}`; `products`, how many times kernels were launched.

    Raises:
        RuntimeError: if layers say that they ran and their kernels did not, or not on the operands that the
            layers stand for.
    """
    layers = packed_layers(model)
    for layer in layers.values():
        layer.calls = 0
    result: dict[str, Any] = {}
    counter = KernelCounter()
    with counter if watch and layers else nullcontext():
        yield result
    ran = [layer for layer in layers.values() if layer.calls > 0]
    result |= {
        "linears": len(layers),
        "integer": sum(1 for layer in ran if layer.activation_scheme is not None),
        "by_kind": dict(Counter(layer.kind for layer in ran)),
    }
    if watch and layers:
        _check(ran, counter)
        result["products"] = {"integer": counter.integer, "float": counter.float}


def _check(ran: list[PackedLinear], counter: KernelCounter) -> None:
    expected_integer = sum(layer.calls for layer in ran if layer.activation_scheme is not None)
    expected_float = sum(layer.calls for layer in ran if layer.activation_scheme is None)
    if (counter.integer, counter.float) != (expected_integer, expected_float):
        raise RuntimeError(
            f"{counter.integer} integer and {counter.float} weight-only products ran where the packed layers "
            f"were called {expected_integer} and {expected_float} times: not the model that would be served"
        )
