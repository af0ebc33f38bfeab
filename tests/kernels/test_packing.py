"""Packed codes: dense, and the same after unpacking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatapult.kernels import Scheme, pack, packed_features, unpack

SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=4),
    Scheme(bits=3),
    Scheme(bits=2),
    Scheme(bits=1.58),
    Scheme(bits=1, grid="stretched"),
]


@settings(max_examples=80, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(0, 3),
    features=st.integers(1, 41),
    seed=st.integers(0, 99),
)
def test_round_trip(scheme: Scheme, rows: int, features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        scheme.qmin, scheme.qmax + 1, (2, rows, features), generator=generator, dtype=torch.int8
    )
    packed = pack(codes, scheme)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_features(features, scheme))
    assert torch.equal(unpack(packed, scheme, features), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_is_dense(scheme: Scheme) -> None:
    assert packed_features(64, scheme) == 64 * scheme.storage_bits // 8


def test_low_bits_first() -> None:
    assert pack(torch.tensor([[-8, 7]], dtype=torch.int8), Scheme(bits=4)).tolist() == [[0xF0]]
    assert pack(
        torch.tensor([[0, -1, -1, -1]], dtype=torch.int8), Scheme(bits=1, grid="stretched")
    ).tolist() == [[1]]


def test_refuses_codes_outside_the_grid() -> None:
    with pytest.raises(ValueError, match=r"outside \[-8, 7\]"):
        pack(torch.tensor([[8]], dtype=torch.int8), Scheme(bits=4))


def test_refuses_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="takes 2"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), Scheme(bits=4), 4)
