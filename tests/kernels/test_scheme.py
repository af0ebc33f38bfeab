"""The definition of the grid: its numbers, its shapes, and what it refuses."""

from __future__ import annotations

import pickle

import pytest

from qatapult.kernels import Scheme


@pytest.mark.parametrize(
    ("bits", "grid", "qmin", "qmax", "offset", "storage"),
    [
        (8, "integer", -128, 127, 0.0, 8),
        (4, "integer", -8, 7, 0.0, 4),
        (3, "integer", -4, 3, 0.0, 3),
        (2, "integer", -2, 1, 0.0, 2),
        (2, "stretched", -2, 1, 0.5, 2),
        (1.58, "integer", -1, 1, 0.0, 2),
        (1.58, "stretched", -1, 1, 0.0, 2),
        (1, "stretched", -1, 0, 0.5, 1),
    ],
)
def test_codes_and_levels(bits: float, grid: str, qmin: int, qmax: int, offset: float, storage: int) -> None:
    scheme = Scheme(bits=bits, grid=grid)
    assert (scheme.qmin, scheme.qmax, scheme.level_offset) == (qmin, qmax, offset)
    assert scheme.levels == qmax - qmin + 1
    assert scheme.storage_bits == storage


def test_scale_shapes() -> None:
    assert Scheme(granularity="tensor").scale_shape((3, 8)) == (1,)
    assert Scheme(granularity="channel").scale_shape((3, 8)) == (3, 1)
    assert Scheme(granularity="token").scale_shape((2, 3, 8)) == (2, 3, 1)
    assert Scheme(granularity="group", group_size=4).scale_shape((3, 8)) == (3, 2)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"bits": 5}, "8, 4, 3, 2, 1.58, 1"),
        ({"granularity": "row"}, "tensor, channel, group, token"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 32}, "granularity='group'"),
        ({"granularity": "group", "group_size": 0}, "at least 1"),
        ({"bits": 4, "grid": "stretched"}, "2, 1.58 or 1"),
        ({"bits": 1}, "grid='stretched'"),
        ({"bits": 1.58, "symmetric": False}, "symmetric=True"),
        ({"symmetric": False, "range_method": "absmean"}, "symmetric=True"),
        ({"percentile": 0.2}, "above 0.5"),
        ({"scale_dtype": "float64"}, "float32, bfloat16, float16"),
    ],
)
def test_refuses_what_has_no_meaning(fields: dict[str, object], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        Scheme(**fields)


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="32 or 64"):
        Scheme(bits=4, granularity="group", group_size=128).scale_shape((4, 576))


def test_is_a_value() -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=32)
    assert pickle.loads(pickle.dumps(scheme)) == scheme
    assert len({scheme, Scheme(bits=4, granularity="group", group_size=32)}) == 1
    assert scheme.describe() == "int4 g32"
