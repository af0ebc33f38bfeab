"""`choose_range`: the formulas, the rule for nasty blocks, and that each method does what it is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatapult.kernels import Scheme, choose_range, dequantize, quantize, scale_from_clip

INT4 = Scheme(bits=4)


def error(x: torch.Tensor, scheme: Scheme) -> float:
    scale, zero = choose_range(x, scheme)
    return float((dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme) - x).square().mean())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (INT4, 3 / 7.5),
        (Scheme(bits=8), 3 / 127.5),
        (Scheme(bits=1.58), 3.0),
        (Scheme(bits=1.58, range_method="absmean"), 1.5),
        (Scheme(bits=1, grid="stretched", range_method="absmean"), 3.0),
        (Scheme(bits=2, grid="stretched"), 1.5),
        (Scheme(bits=4, range_method="absmean"), 2 * 1.5 / 7**0.5),
    ],
)
def test_symmetric_formulas(device: str, scheme: Scheme, expected: float) -> None:
    scale, zero = choose_range(torch.tensor([[1.0, -2.0, 3.0, 0.0]], device=device), scheme)
    assert zero is None
    assert scale.item() == pytest.approx(expected, rel=1e-6)


def test_asymmetric_formula(device: str) -> None:
    scale, zero = choose_range(
        torch.tensor([[-1.0, 2.0], [3.0, 4.0]], device=device), Scheme(bits=4, symmetric=False)
    )
    assert scale.tolist() == [[np.float32(3) / np.float32(15)], [np.float32(4) / np.float32(15)]]
    assert zero is not None
    assert zero.tolist() == [[-3.0], [-8.0]]


def test_division_is_exact(device: str) -> None:
    x = torch.rand(4096, 1) + 0.5
    scale, _ = choose_range(x.to(device), Scheme(bits=8))
    assert np.array_equal(scale.cpu().numpy(), x.numpy() / np.float32(127.5))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes(granularity: str, symmetric: bool) -> None:
    scheme = Scheme(
        bits=4, granularity=granularity, group_size=4 if granularity == "group" else None, symmetric=symmetric
    )
    x = torch.randn(3, 8)
    scale, zero = choose_range(x, scheme)
    assert scale.shape == scheme.scale_shape((3, 8))
    assert (zero is None) == symmetric
    if zero is not None:
        assert zero.shape == scale.shape
        assert torch.equal(zero, zero.round())


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "absmean"])
def test_a_block_of_zeros_has_codes_of_zero(method: str) -> None:
    scheme = Scheme(bits=4, range_method=method)
    scale, _ = choose_range(torch.zeros(2, 8), scheme)
    assert scale.tolist() == [[1.0], [1.0]]


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.floats(width=32), min_size=1, max_size=9),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_scales_are_always_usable(row: list[float], symmetric: bool, scale_dtype: str) -> None:
    scheme = Scheme(bits=4, symmetric=symmetric, scale_dtype=scale_dtype)
    scale, zero = choose_range(torch.tensor([row]), scheme)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(scale, scale.to(getattr(torch, scale_dtype)).float())
    if zero is not None:
        assert scheme.qmin <= zero.item() <= scheme.qmax


def test_mse_beats_minmax_where_there_are_outliers() -> None:
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 12
    for bits in (4, 3, 2):
        for symmetric in (True, False):
            scheme = Scheme(bits=bits, symmetric=symmetric)
            assert error(x, replace(scheme, range_method="mse")) < 0.9 * error(x, scheme)


def test_percentile_leaves_the_largest_out() -> None:
    x = torch.arange(1, 101, dtype=torch.float32).reshape(1, -1)
    scale, _ = choose_range(x, Scheme(bits=4, range_method="percentile", percentile=0.9))
    assert scale.item() == pytest.approx(90 / 7.5)
    scheme = Scheme(bits=4, range_method="percentile", percentile=0.9, symmetric=False)
    scale, _ = choose_range(x - 50, scheme)
    assert scale.item() == pytest.approx((45 + 44) / 15)


def test_clip_is_the_top_level() -> None:
    clip = torch.tensor([[2.8]], requires_grad=True)
    scale = scale_from_clip(clip, INT4)
    top = dequantize(torch.tensor([[7]], dtype=torch.int8), scale.detach(), None, INT4)
    assert top.item() == pytest.approx(2.8)
