"""Which kernels really ran: a score of another arithmetic than the one that is served is worth nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qatapult.kernels import count_products
from qatapult.trainer.quantize.convert import PackedLinear, packed_layers


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Count the packed products of everything that runs inside the block.

    Args:
        model: the model that runs; without packed layers all counts are 0.

    Yields:
        A dictionary that is filled at the end of the block: `linears`, how many packed layers there are;
        `integer`, how many of them multiplied integers; `by_kind`, layers that ran by arithmetic, such as
        `{"int4 × int8": 210}`; `products`, how many products the kernels themselves counted.

    Raises:
        RuntimeError: if layers say that they ran and their kernels did not, or not on the operands that the
            layers stand for.
    """
    layers = packed_layers(model)
    for layer in layers.values():
        layer.calls = 0
    result: dict[str, Any] = {}
    with count_products() as products:
        yield result
    ran = [layer for layer in layers.values() if layer.calls > 0]
    _check(ran, products)
    result |= {
        "linears": len(layers),
        "integer": sum(1 for layer in ran if layer.activation_scheme is not None),
        "by_kind": dict(Counter(layer.kind for layer in ran)),
        "products": {"integer": products["integer"], "float": products["float"]},
    }


def _check(ran: list[PackedLinear], products: Counter[str]) -> None:
    expected = Counter[str]()
    for layer in ran:
        expected["float" if layer.activation_scheme is None else "integer"] += layer.calls
    if any(products[kind] != expected[kind] for kind in ("integer", "float")):
        raise RuntimeError(
            f"{products['integer']} integer and {products['float']} weight-only products ran where the "
            f"packed layers were called {expected['integer']} and {expected['float']} times: "
            "not the model that would be served"
        )
