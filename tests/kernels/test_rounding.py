"""The exactness that codes rest on: rounding by a magic number, division by a reciprocal and residuals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

SCALES = [1.0, 0.1, 3e-5, 1.9999999, 7e-41, 3e37, 2.0**-149, 1.0000001]


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 multiply-add with one rounding: products of two fp32 are exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def divided(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """The arithmetic of `rounding.divide` as a GPU does it, for quotients within ±1000."""
    magnitude = abs(scale)
    shift = np.float32(2.0**64 if magnitude < 2.0**-60 else 2.0**-64 if magnitude > 2.0**60 else 1.0)
    scale, x = scale * shift, x * shift
    x = np.clip(x, -1000 * scale, 1000 * scale)
    reciprocal = np.float32(1) / scale
    quotient = x * reciprocal
    for _ in range(2):
        quotient = fused(fused(-quotient, np.full_like(x, scale), x), np.full_like(x, reciprocal), quotient)
    return quotient


@pytest.mark.parametrize("scale", SCALES)
def test_division_is_correctly_rounded(scale: float) -> None:
    generator = np.random.default_rng(7)
    step = np.float32(scale)
    near_ties = ((generator.integers(-300, 300, 100_000) / 2) * np.float64(step)).astype(np.float32)
    x = np.concatenate(
        [
            (generator.standard_normal(200_000) * 100 * np.float64(step)).astype(np.float32),
            near_ties,
            np.nextafter(near_ties, np.float32(np.inf)),
            np.nextafter(near_ties, np.float32(-np.inf)),
        ]
    )
    with np.errstate(under="ignore", over="ignore"):
        expected = x / step
        actual = divided(x, step)
    inside = (np.abs(expected) < 900) & (np.abs(expected) > 0.25)
    assert inside.sum() > 100_000
    assert np.array_equal(actual[inside], expected[inside])
    assert (np.abs(actual[np.abs(expected) <= 0.25]) <= 0.25).all()


def test_division_on_random_scales() -> None:
    generator = np.random.default_rng(8)
    for scale in generator.uniform(0.5, 2, 200).astype(np.float32):
        x = generator.uniform(-500, 500, 2_000).astype(np.float32) * scale
        assert np.array_equal(divided(x, scale), x / scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_division_on_the_gpu() -> None:
    from qatapult.kernels import Scheme, quantize

    for scale in SCALES:
        step = torch.full((64, 1), scale)
        x = torch.cat(
            [torch.randn(64, 4096) * 60 * step, torch.arange(-8192, 8192).reshape(64, -1) / 64 * step], 1
        )
        on_gpu = quantize(x.cuda(), step.cuda(), None, Scheme())
        assert torch.equal(on_gpu.cpu(), quantize(x, step, None, Scheme()))


def test_magic_number_rounds_half_to_even_without_negative_zero() -> None:
    x = np.concatenate(
        [np.arange(-700, 700, dtype=np.float32) / 4, np.linspace(-300, 300, 9999, dtype=np.float32)]
    )
    magic = np.float32(12582912.0)
    rounded = (x + magic) - magic
    assert np.array_equal(rounded, np.rint(x))
    assert not np.signbit(rounded[rounded == 0]).any()
