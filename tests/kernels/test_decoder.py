"""Norm, gate and attention of the serving path against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatapult.kernels import attention, rms_norm, silu_product, use_backend
from qatapult.kernels.decoder import reference

DTYPES = [torch.float32, torch.bfloat16]
# Batch, heads, key heads, queries, keys, size of a head.
SHAPES = [
    (1, 3, 1, 1, 1, 32),
    (2, 6, 3, 1, 77, 64),
    (1, 4, 4, 5, 5, 32),
    (2, 4, 2, 49, 49, 48),
    (1, 9, 3, 131, 131, 64),
    (1, 2, 1, 7, 40, 128),
    (1, 2, 1, 6, 6, 20),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, key_heads, queries, keys, size = shape
    query = (normal(batch, queries, heads, size, seed=1) * 2).to(dtype).transpose(1, 2)
    key, value = (normal(batch, key_heads, keys, size, seed=seed).to(dtype) for seed in (2, 3))
    result = attention(query, key, value, 0.2)
    expected = reference.attention(query.double(), key.double(), value.double(), 0.2)
    assert (result.dtype, result.shape) == (dtype, (batch, queries, heads, size))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_attention_with_scores_beyond_exp_and_with_nan() -> None:
    query, key, value = (normal(1, 1, 20, 32, seed=seed) for seed in range(3))
    sharp = attention(query * 1e3, key, value, 1.0)
    expected = reference.attention((query * 1e3).double(), key.double(), value.double(), 1.0).float()
    torch.testing.assert_close(sharp, expected, rtol=1e-4, atol=1e-4)
    query[0, 0, 7] = float("nan")
    assert attention(query, key, value, 1.0).isnan().all(-1).nonzero()[:, 1].tolist() == [7]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("size", [64, 576, 30])
def test_norm_and_gate(size: int, dtype: torch.dtype) -> None:
    x, other, weight = (
        normal(3, 5, size).to(dtype),
        normal(3, 5, size, seed=1).to(dtype),
        normal(size).to(dtype),
    )
    # A value on a border of bf16 may be rounded either way.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    norms = rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(*norms, rtol=tolerance, atol=tolerance)
    gates = silu_product(x * 9, other), reference.silu_product(x * 9, other)
    torch.testing.assert_close(*gates, rtol=tolerance, atol=tolerance)
    with use_backend("reference"):
        assert torch.equal(rms_norm(x, weight, 1e-5), norms[1])


def test_gate_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 1e30, float("nan")]).repeat(4)
    result = silu_product(gate, torch.ones(32))
    torch.testing.assert_close(result, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-8, equal_nan=True)
