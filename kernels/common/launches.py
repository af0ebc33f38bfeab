"""A count of the products that ran, made where they run: evaluation compares it with what should have run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Product = Literal["integer", "float"]

_listeners: list[Counter[str]] = []


def record(product: Product, count: int = 1) -> None:
    """Note products on packed weights that ran: of integer codes, or with inputs in floating point."""
    for listener in _listeners:
        listener[product] += count


@contextmanager
def count_products() -> Iterator[Counter[str]]:
    """Count the products on packed weights that run inside the block, by `integer` and `float`.

    Graphs that a compiler or CUDA replays are not counted: their launches pass no Python.
    """
    counts: Counter[str] = Counter()
    _listeners.append(counts)
    try:
        yield counts
    finally:
        _listeners.remove(counts)
