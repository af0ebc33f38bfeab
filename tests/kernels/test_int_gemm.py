"""Integer products equal an integer reference bit for bit, on every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qatapult.kernels import Scheme, int_matmul, quantize_activations
from qatapult.kernels.int_gemm import cpu
from qatapult.kernels.int_gemm.reference import int_matmul_reference, quantize_activations_reference

TOKENS = Scheme(granularity="token")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
@example(3, 5, 1, 0)
def test_int_matmul_is_exact_on_every_shape(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    assert torch.equal(int_matmul(a, b), int_matmul_reference(a, b))


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("k", [1023, 1024, 1025, 5000])
def test_int_matmul_is_exact_where_fp32_alone_is_not(
    k: int, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All codes at −128 reach K · 2^14, beyond the integers that fp32 holds from K = 1024 on."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    a = torch.full((3, k), -128, dtype=torch.int8)
    a[1, ::2] = 127
    b = torch.full((2, k), -128, dtype=torch.int8)
    b[1, 1::3] = 1
    assert torch.equal(cpu.int_matmul_cpu(a, b), int_matmul_reference(a, b))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8), "int8 codes"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8), r"\[M, K\] and \[N, K\]"),
        (torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(1, 2**17, dtype=torch.int8), "overflow"),
    ],
)
def test_int_matmul_refuses_what_it_cannot_multiply(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int_matmul(a, b)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([8, 4]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 999),
)
def test_activation_codes_equal_the_reference_bit_for_bit(
    tokens: int, k: int, dtype: torch.dtype, bits: int, scale_dtype: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, tokens, k, generator=generator) * 10 ** (seed % 7 - 3)).to(dtype)
    nasty = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 0.5, -2.5])
    spots = torch.randint(0, x.numel(), (seed % 4,), generator=generator)
    x.view(-1)[spots] = nasty[torch.randint(0, 8, (len(spots),), generator=generator)].to(dtype)
    scheme = Scheme(bits=bits, granularity="token", scale_dtype=scale_dtype)
    codes, scale = quantize_activations(x, scheme)
    expected_codes, expected_scale = quantize_activations_reference(x, scheme)
    assert codes.dtype == torch.int8
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected_codes)


def test_zero_tokens_and_wrong_schemes() -> None:
    codes, scale = quantize_activations(torch.zeros(2, 8), TOKENS)
    assert not codes.any()
    assert torch.equal(scale, torch.ones(2, 1))
    for wrong in (Scheme(), Scheme(granularity="token", symmetric=False)):
        with pytest.raises(ValueError, match="granularity='token', symmetric=True"):
            quantize_activations(torch.ones(2, 8), wrong)


def test_the_operator_passes_opcheck() -> None:
    a = torch.randint(-128, 128, (3, 20), dtype=torch.int8)
    torch.library.opcheck(torch.ops.qatapult.int_matmul, (a, a[:2].clone()))
