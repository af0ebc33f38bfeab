"""`quantize` and `dequantize` against an independent implementation, on every backend, with nasty values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatapult.kernels import Scheme, dequantize, quantize, use_backend

SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=3),
    Scheme(bits=2),
    Scheme(bits=2, grid="stretched"),
    Scheme(bits=1.58),
    Scheme(bits=1, grid="stretched"),
]
NASTY = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1.1754944e-38,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    7.5,
    127.5,
    -128.5,
    3.4e38,
    -3.4e38,
]
NASTY += [float("inf"), float("-inf"), float("nan")]

values = st.one_of(st.sampled_from(NASTY), st.floats(width=32), st.floats(-20, 20, width=32))
scales = (
    st.floats(2.0**-126, 2.0**120, width=32)
    | st.floats(0.015625, 4, width=32)
    | st.sampled_from([1.0, 0.5, 1e-42])
)


def expected_codes(x: np.ndarray, scale: np.float32, zero: int, scheme: Scheme) -> np.ndarray:
    """The definition in NumPy's fp32, one block."""
    with np.errstate(all="ignore"):
        quotient = np.where(np.isnan(x), np.float32(0), x) / scale
        quotient = np.where(np.isnan(quotient), np.float32(0), quotient)
        level = np.rint(quotient - np.float32(scheme.level_offset))
    return np.clip(level + zero, scheme.qmin, scheme.qmax).astype(np.int8)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    scheme=st.sampled_from(SCHEMES),
    row=st.lists(values, min_size=1, max_size=17),
    scale=scales,
)
def test_codes_of_any_value(data: st.DataObject, scheme: Scheme, row: list[float], scale: float) -> None:
    zero = 0 if scheme.symmetric else data.draw(st.integers(scheme.qmin, scheme.qmax))
    x = np.asarray([row], dtype=np.float32)
    zero_point = None if scheme.symmetric else torch.full((1, 1), float(zero))
    expected = expected_codes(x, np.float32(scale), zero, scheme)
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            codes = quantize(torch.from_numpy(x), torch.full((1, 1), scale), zero_point, scheme)
        assert np.array_equal(codes.numpy(), expected), backend


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_on_every_backend(backend, scheme: Scheme, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([[1.0], [0.1], [1e-30], [3e-41], [1e30], [0.7]])
    x = torch.randn(6, 37, generator=generator) * scale * scheme.levels / 3
    x[0, : len(NASTY)] = torch.tensor(NASTY)
    x[5] = (torch.arange(37) - 18) / 2 * 0.7
    x = x.to(dtype)
    zero = None if scheme.symmetric else torch.tensor([[0.0], [-8.0], [7.0], [1.0], [-1.0], [3.0]])
    codes = quantize(x.to(backend.device), *_to(backend.device, scale, zero), scheme)
    for row in range(6):
        expected = expected_codes(
            x[row].float().numpy(), scale[row].numpy()[0], 0 if zero is None else int(zero[row]), scheme
        )
        assert np.array_equal(codes[row].cpu().numpy(), expected), row


@settings(max_examples=100, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), scale=st.floats(2.0**-100, 2.0**100, width=32), data=st.data())
def test_every_code_returns(scheme: Scheme, scale: float, data: st.DataObject) -> None:
    zero = None if scheme.symmetric else torch.full((1, 1), float(data.draw(st.integers(-8, 7))))
    codes = torch.arange(scheme.qmin, scheme.qmax + 1, dtype=torch.int8).reshape(1, -1)
    step = torch.full((1, 1), scale)
    assert torch.equal(quantize(dequantize(codes, step, zero, scheme), step, zero, scheme), codes)


def test_groups_use_their_own_scale() -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=2)
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    assert quantize(x, torch.tensor([[1.0, 0.5]]), None, scheme).tolist() == [[1, 2, 2, 4]]


def test_not_contiguous() -> None:
    x, scale = torch.randn(5, 3), torch.rand(3, 1) + 0.1
    assert torch.equal(
        quantize(x.T, scale, None, Scheme()), quantize(x.T.contiguous(), scale, None, Scheme())
    )


@pytest.mark.parametrize(
    ("scale", "zero", "scheme", "hint"),
    [
        (torch.ones(3), None, Scheme(), r"its shape would be \(4, 1\)"),
        (torch.ones(4, 1), torch.zeros(4), Scheme(bits=4, symmetric=False), "must have the scale's shape"),
        (torch.ones(4, 1), torch.zeros(4, 1), Scheme(), "symmetric=False"),
        (torch.ones(4, 1), None, Scheme(bits=4, granularity="group", group_size=3), "does not divide"),
    ],
)
def test_refuses_scales_of_another_tensor(
    scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, hint: str
) -> None:
    with pytest.raises(ValueError, match=hint):
        quantize(torch.ones(4, 8), scale, zero, scheme)


def _to(device: str, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]
