"""The cache's integers: bounds of the error, sizes, and agreement of training with serving."""

from __future__ import annotations

import pytest
import torch

from qatapult.kernels import Scheme, dequantize_kv, fake_quantize_kv, kv_scheme, quantize_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_training_sees_what_the_cache_returns(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    scheme = kv_scheme(bits, symmetric)
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, scale, zero_point = quantize_kv(x, scheme)
    assert packed.shape == (2, 3, 5, 64 * bits // 8)
    assert packed.dtype == torch.uint8
    assert scale.dtype == torch.float16
    assert (zero_point is None) == symmetric
    back = dequantize_kv(packed, scale, zero_point, scheme, 64, dtype)
    assert torch.equal(back, fake_quantize_kv(x, scheme))
    # Half a step, and as much again where the largest element is clamped or the scale and zero point are
    # rounded.
    assert ((back - x).abs() <= scale.float() * 1.05 + 2**-8 * x.abs()).all()


def test_each_head_and_token_has_its_own_range() -> None:
    x = torch.ones(1, 2, 3, 8)
    x[0, 1, 2] = 1000.0
    _, scale, _ = quantize_kv(x, kv_scheme(8))
    assert scale.shape == (1, 2, 3, 1)
    assert (scale.flatten()[:-1] < 0.01).all()
    assert scale.flatten()[-1] > 7


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(2, 2, 4, 16, requires_grad=True)
    fake_quantize_kv(x, kv_scheme(4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 4 or 8"):
        kv_scheme(3)
    with pytest.raises(ValueError, match="kv_scheme"):
        quantize_kv(torch.ones(2, 2), Scheme())
