"""`fake_quantize` and `fake_quantize_dynamic`: values and gradients, the same on every backend."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatapult.kernels import (
    Scheme,
    choose_range,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    quantize_dynamic,
    scale_from_clip,
    use_backend,
)

SCHEMES = [
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=4, granularity="group", group_size=5),
    Scheme(bits=3, granularity="group", group_size=1),
    Scheme(bits=2, grid="stretched"),
    Scheme(bits=1.58, range_method="absmean"),
    Scheme(bits=1, grid="stretched", range_method="absmean"),
]
DYNAMIC = [
    Scheme(bits=8, granularity="token"),
    Scheme(bits=8, granularity="token", symmetric=False),
    Scheme(bits=4, granularity="group", group_size=5, scale_dtype="bfloat16"),
    Scheme(bits=8, granularity="token", symmetric=False, scale_dtype="float16"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NASTY = [0.0, -0.0, 1e-45, -1e-40, 0.5, -0.5, 7.5, -8.5, 3.4e38, float("inf"), float("-inf"), float("nan")]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, signs of zeros included; any NaN equals any NaN."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    actual, expected = actual.masked_fill(nan, 1), expected.masked_fill(nan, 1)
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


def expected_gradients(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grad: torch.Tensor,
    scheme: Scheme,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rules of `fake_quantize`, element by element in float64."""
    features = x.shape[-1] // max(1, scale.numel() // (1 if scheme.granularity == "tensor" else x.shape[0]))
    size = x.numel() // scale.numel()
    assert scheme.granularity == "tensor" or size == features
    grad_x, grad_scale, grad_zero = torch.zeros(x.shape).double(), torch.zeros(scale.numel()).double(), None
    grad_zero = torch.zeros(scale.numel()).double()
    top = scheme.qmax + scheme.level_offset
    factor = 1 / (size * top) ** 0.5 if rule == "lsq" else 1.0
    for index, (value, g) in enumerate(zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True)):
        step = scale.flatten()[index // size].item()
        low, high = (
            bound - (0 if zero is None else zero.flatten()[index // size].item())
            for bound in (scheme.qmin, scheme.qmax)
        )
        quotient = float(torch.tensor(value) / torch.tensor(step))
        level = round(min(max(quotient - scheme.level_offset, low), high)) + scheme.level_offset
        inside = low <= quotient <= high + 2 * scheme.level_offset
        slope = level
        if rule == "pact":
            slope = 0.0 if inside else level
        elif scheme.levels > 2 and inside:
            slope = level - quotient
        grad_x.view(-1)[index] = g if inside else 0.0
        grad_scale[index // size] += factor * g * slope
        grad_zero[index // size] += 0.0 if inside else -factor * g * step
    return grad_x, grad_scale.reshape(scale.shape), grad_zero.reshape(scale.shape)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("rule", ["lsq", "pact", "ste"])
def test_gradients(backend, scheme: Scheme, rule: str) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 15, generator=generator)
    scale, zero = choose_range(x, scheme)
    scale = scale * 0.6
    x[0, :4] = torch.tensor([-8.0, 7.0, 0.0, 2.5]) * scale.flatten()[0]
    grad = torch.randn(5, 15, generator=generator)
    expected = expected_gradients(x, scale, zero, grad, scheme, rule)
    inputs = [None if t is None else t.to(backend.device).requires_grad_() for t in (x, scale, zero)]
    fake_quantize(*inputs, scheme=scheme, gradient=rule).backward(grad.to(backend.device))
    assert_same_bits(inputs[0].grad, expected[0].float())
    for tensor, right in zip(inputs[1:], expected[1:], strict=True):
        if rule == "ste" or tensor is None:
            assert tensor is None or tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad.cpu(), right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_codes(backend, scheme: Scheme, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(5, 15, generator=torch.Generator().manual_seed(3)).to(dtype).to(backend.device)
    scale, zero = choose_range(x, scheme)
    x[0, : len(NASTY) - 1] = torch.tensor(NASTY[:-1], device=backend.device)
    values = fake_quantize(x, scale, zero, scheme=scheme)
    assert_same_bits(values, dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme, dtype))


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 9),
    rule=st.sampled_from(["lsq", "pact"]),
    data=st.data(),
)
def test_backends_agree_bit_for_bit(
    scheme: Scheme, dtype: torch.dtype, rows: int, blocks: int, rule: str, data: st.DataObject
) -> None:
    features = 5 * blocks
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(rows, features, generator=generator)
    scale, zero = choose_range(x, scheme)
    scale = scale * data.draw(st.sampled_from([1.0, 0.5, 1e-30, 1e30]))
    x = x * data.draw(st.sampled_from([1.0, 1e-30, 1e30]))
    for position in data.draw(st.lists(st.integers(0, rows * features - 1), max_size=4)):
        x.view(-1)[position] = data.draw(st.sampled_from(NASTY))
    x, grad = x.to(dtype), torch.randn(rows, features, generator=generator).to(dtype)
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            inputs = [None if t is None else t.clone().requires_grad_() for t in (x, scale, zero)]
            values = fake_quantize(*inputs, scheme=scheme, gradient=rule)
            values.backward(grad)
            results[backend] = (quantize(x, scale, zero, scheme), values, inputs[0].grad)
    for reference, compiled in zip(results["reference"], results["cpu"], strict=True):
        assert_same_bits(compiled, reference)


@pytest.mark.parametrize("scheme", DYNAMIC, ids=Scheme.describe)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [5, 135])
def test_dynamic_is_choose_range_and_fake_quantize(
    backend, scheme: Scheme, dtype: torch.dtype, features: int
) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 7, features, generator=torch.Generator().manual_seed(1))
    x[0, 1], x[0, 2], x[0, 3], x[0, 4] = 0.0, x[0, 2] * 1e-7, 1e-45, x[0, 4] * 1e4
    x[1, 0, 0], x[1, 1, 2], x[1, 2, 1] = float("inf"), float("-inf"), float("nan")
    x = x.to(dtype).to(backend.device)
    with use_backend("reference"):
        scale, zero = choose_range(x, scheme)
        codes, values = quantize(x, scale, zero, scheme), fake_quantize(x, scale, zero, scheme=scheme)
    actual_codes, actual_scale, actual_zero = quantize_dynamic(x, scheme)
    assert torch.equal(actual_codes, codes)
    assert torch.equal(actual_scale, scale)
    assert (actual_zero is None) == scheme.symmetric
    if zero is not None:
        assert torch.equal(actual_zero, zero)
    assert_same_bits(fake_quantize_dynamic(x, scheme), values)


def test_dynamic_passes_gradients_straight_through(backend) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, 9, device=backend.device, requires_grad=True)
    grad = torch.randn(3, 9, device=backend.device)
    fake_quantize_dynamic(x, Scheme(bits=8, granularity="token")).backward(grad)
    assert torch.equal(x.grad, grad)


def test_dynamic_with_other_ranges_masks() -> None:
    x = torch.arange(1.0, 101).reshape(1, -1).requires_grad_()
    scheme = Scheme(bits=8, granularity="token", range_method="percentile", percentile=0.9)
    fake_quantize_dynamic(x, scheme).sum().backward()
    assert x.grad[0, :89].eq(1).all()
    assert x.grad[0, 90:].eq(0).all()


@pytest.mark.parametrize(("rows", "features"), [(3, 4097), (1, 70001), (700, 33)])
def test_long_and_many_blocks(rows: int, features: int) -> None:
    """More than one piece a block, and both orders of summation: sums do not depend on threads or runs."""
    x = torch.randn(rows, features)
    scheme = Scheme(bits=4)
    scale, _ = choose_range(x, scheme)
    grads = {}
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("cpu", 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        learned = scale.clone().requires_grad_()
        with use_backend(backend):
            fake_quantize(x, learned, scheme=scheme).backward(x)
        torch.set_num_threads(before)
        grads.setdefault(backend, []).append(learned.grad)
    assert all(torch.equal(grad, grads["cpu"][0]) for grad in grads["cpu"])
    torch.testing.assert_close(grads["cpu"][0], grads["reference"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(150_000, 8), (70_001, 4096)])
def test_as_many_channels_as_a_vocabulary(shape: tuple[int, int]) -> None:
    x, scheme = torch.randn(shape, device="cuda", dtype=torch.bfloat16), Scheme(bits=4)
    scale, _ = choose_range(x, scheme)
    with use_backend("reference"):
        expected = fake_quantize(x, scale, scheme=scheme)
    assert_same_bits(fake_quantize(x, scale, scheme=scheme), expected)


def test_triton_splits_long_blocks() -> None:
    triton_kernel = pytest.importorskip("qatapult.kernels.fake_quant.triton_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 9001, device=device)
    scheme = Scheme(bits=4)
    scale, _ = choose_range(x, scheme)
    grads = []
    for backend in ("reference", "triton"):
        learned = scale.clone().requires_grad_()
        with use_backend(backend):
            fake_quantize(x, learned, scheme=scheme).backward(x)
        grads.append(learned.grad)
    assert triton_kernel.tile_of(9001) == (2, 2048)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_smooth_parts_pass_gradcheck() -> None:
    """Outside of the range the value is `level · scale`: there the rules give the true gradient."""
    scheme = Scheme(bits=4)
    x = torch.tensor([[40.0, -60.0, 90.0, -33.0]])
    scale = torch.tensor([[1.5]], requires_grad=True)
    for rule, factor in (("pact", 1.0), ("lsq", (4 * 7) ** -0.5)):
        (grad,) = torch.autograd.grad(
            fake_quantize(x, scale, scheme=scheme, gradient=rule).square().sum(), scale
        )
        step = 1e-2
        low, high = (fake_quantize(x, scale + s, scheme=scheme).square().sum() for s in (-step, step))
        assert grad.item() == pytest.approx(factor * (high - low).item() / (2 * step), rel=1e-3)


def test_learned_clip_follows_pact() -> None:
    scheme = Scheme(bits=4, granularity="tensor")
    clip = torch.tensor([2.0], requires_grad=True)
    x = torch.tensor([[0.5, 1.0, 3.0, 5.0, -9.0]])
    fake_quantize(x, scale_from_clip(clip, scheme), scheme=scheme, gradient="pact").sum().backward()
    assert clip.grad.item() == pytest.approx(1 + 1 - 8 / 7)


def test_learned_zero_points_are_rounded_in_use() -> None:
    scheme = Scheme(bits=4, symmetric=False)
    x, scale = torch.randn(2, 8), torch.full((2, 1), 0.3)
    learned = fake_quantize(x, scale, torch.full((2, 1), 1.4), scheme=scheme)
    assert torch.equal(learned, fake_quantize(x, scale, torch.full((2, 1), 1.0), scheme=scheme))


def test_range_ends_are_inside() -> None:
    x = torch.tensor([[-8.0, 7.0, -8.5, 7.5]], requires_grad=True)
    fake_quantize(x, torch.ones(1, 1), scheme=Scheme(bits=4)).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0]]


def test_nan_stays_visible(backend) -> None:  # type: ignore[no-untyped-def]
    x = torch.tensor([[float("nan"), 1.0]], device=backend.device)
    values = fake_quantize(x, torch.ones(1, 1, device=backend.device), scheme=Scheme())
    assert values.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(backend, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    scheme = Scheme(bits=4, symmetric=False)
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    scale = torch.ones(scheme.scale_shape(shape), device=backend.device).requires_grad_()
    zero = torch.zeros_like(scale, requires_grad=True)
    fake_quantize(x, scale, zero, scheme=scheme).sum().backward()
    assert x.grad.shape == shape
    assert scale.grad.eq(0).all()
    assert zero.grad.eq(0).all()
    assert fake_quantize_dynamic(x, Scheme(granularity="token")).shape == shape


def test_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="lsq, pact, ste"):
        fake_quantize(torch.ones(1, 2), torch.ones(1, 1), scheme=Scheme(), gradient="dorefa")


@pytest.mark.parametrize(("scheme", "dtype"), product(SCHEMES[:2], DTYPES))
def test_long_rows_in_the_interpreter(scheme: Scheme, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 4099, device=device).to(dtype)
    scale, zero = choose_range(x, scheme)
    with use_backend("triton"):
        actual = fake_quantize(x, scale, zero, scheme=scheme)
    with use_backend("reference"):
        assert_same_bits(actual, fake_quantize(x, scale, zero, scheme=scheme))
