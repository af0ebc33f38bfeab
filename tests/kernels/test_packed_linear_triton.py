"""The Triton products: layout, integer sums bit for bit, scales, zero points, every split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from qatapult.kernels import (
    Scheme,
    choose_range,
    dequantize,
    pack,
    packed_linear,
    quantize,
    quantize_activations,
    use_backend,
)
from qatapult.kernels.int_gemm.configs import GemmConfig, VectorConfig
from qatapult.kernels.int_gemm.cuda import packed_product_triton
from qatapult.kernels.int_gemm.reference import (
    int_matmul_reference,
    packed_linear_reference,
    quantize_activations_reference,
)
from qatapult.kernels.int_gemm.tiles import TileLayout, from_tiles, to_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = (8, 4, 3, 2, 1)


def codes_of(bits: int, rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = 1 << bits - 1
    return (
        torch.randint(-top, top if bits > 1 else 1, (rows, features), generator=generator)
        .to(torch.int8)
        .to(DEVICE)
    )


@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 140), st.integers(1, 700), st.sampled_from([32, 64]))
def test_tiles_hold_every_code(bits: int, rows: int, features: int, width: int) -> None:
    codes = codes_of(bits, rows, features)
    layout = TileLayout(bits, width)
    tiles = to_tiles(codes, layout)
    assert tiles.numel() >= rows * features * bits / 8
    assert torch.equal(from_tiles(tiles, layout, rows, features), codes)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 65, 33), (17, 70, 261), (18, 64, 256)])
@pytest.mark.parametrize("bits", BITS)
def test_integer_sums_equal_the_reference_bit_for_bit(bits: int, m: int, n: int, k: int, split: int) -> None:
    w, x = codes_of(bits, n, k), codes_of(8, m, k, seed=1)
    layout = TileLayout(bits, 32)
    config = GemmConfig(64, 16, split)
    scale = torch.ones(n, 1, device=DEVICE)
    sums = packed_product_triton(
        x, None, to_tiles(w, layout), scale, None, None, layout, False, torch.int32, config
    )
    assert torch.equal(sums, int_matmul_reference(x, w))
    again = packed_product_triton(
        x, None, to_tiles(w, layout), scale, None, None, layout, False, torch.int32, config
    )
    assert torch.equal(again, sums)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("bits", BITS)
def test_sums_for_one_token_equal_the_reference_bit_for_bit(bits: int, width: int) -> None:
    layout = TileLayout(bits, width)
    w, x = codes_of(bits, 70, 3 * layout.unit), codes_of(8, 1, 3 * layout.unit, seed=1)
    scale = torch.ones(70, 1, device=DEVICE)
    tiles = to_tiles(w, layout)
    config = VectorConfig(8, 2, 4)
    sums = packed_product_triton(x, None, tiles, scale, None, None, layout, False, torch.int32, config)
    assert torch.equal(sums, int_matmul_reference(x, w))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 256), (17, 300, 384), (18, 256, 197)])
def test_units_multiplied_whole_give_the_same_sums(m: int, n: int, k: int, split: int) -> None:
    w, x = codes_of(4, n, k), codes_of(8, m, k, seed=1)
    layout, config = TileLayout(4, 64), GemmConfig(64, 16, split)
    scale = torch.ones(n, 1, device=DEVICE)
    tiles = to_tiles(w, layout)
    sums = packed_product_triton(x, None, tiles, scale, None, None, layout, False, torch.int32, config)
    assert torch.equal(sums, int_matmul_reference(x, w))


@pytest.mark.parametrize(
    ("m", "config"),
    [(1, VectorConfig(4, 2, 2)), (5, GemmConfig(64, 16, 2))],
    ids=["one", "whole"],
)
@pytest.mark.parametrize("group", [64, 128, 0])
def test_scales_of_groups_in_the_other_kernels(m: int, config: GemmConfig | VectorConfig, group: int) -> None:
    scheme = Scheme(bits=4, granularity="group" if group else "channel", group_size=group or None)
    codes, x = codes_of(4, 70, 384), codes_of(8, m, 384, seed=1)
    layout = TileLayout(4, 64)
    scale = torch.rand(70, 384 // (group or 384), device=DEVICE) + 0.1
    token_scale = torch.rand(m, 1, device=DEVICE)
    bias = torch.arange(70.0, device=DEVICE)
    tiles = to_tiles(codes, layout)
    result = packed_product_triton(
        x, token_scale, tiles, scale, None, bias, layout, False, torch.float32, config
    )
    weight = dequantize(codes, scale, None, scheme).double()
    expected = (x.double() @ weight.t() * token_scale + bias).float()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-2)


SCHEMES = [
    Scheme(bits=8, symmetric=False),
    Scheme(bits=8, granularity="group", group_size=128),
    Scheme(bits=4),
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=4, granularity="group", group_size=128),
    Scheme(bits=4, granularity="group", group_size=64, symmetric=False),
    Scheme(bits=4, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=3, granularity="group", group_size=64, symmetric=False),
    Scheme(bits=3),
    Scheme(bits=2, granularity="group", group_size=64, grid="stretched"),
    Scheme(bits=2, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=1.58, range_method="absmean"),
    Scheme(bits=1, grid="stretched"),
    Scheme(bits=1, grid="stretched", granularity="group", group_size=64),
    Scheme(bits=4, granularity="group", group_size=16),
]


#: The interpreter multiplies bf16 wrongly.
FLOATS = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activations", [Scheme(granularity="token"), None], ids=["A8", "A16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_scales_and_zero_points(scheme: Scheme, activations: Scheme | None, dtype: torch.dtype) -> None:
    features = 384 if scheme.granularity == "group" else 197
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, features, generator=generator) + 0.3
    scale, zero_point = choose_range(weight, scheme)
    packed = pack(quantize(weight, scale, zero_point, scheme), scheme).to(DEVICE)
    scale, zero_point = scale.to(DEVICE), None if zero_point is None else zero_point.to(DEVICE)
    x = torch.randn(2, 3, features, generator=generator).to(DEVICE, dtype)
    bias = torch.arange(70.0, device=DEVICE)
    arguments = {"weight_scheme": scheme, "activation_scheme": activations, "features": features}
    expected = packed_linear_reference(
        x, packed, scale, zero_point, bias, **arguments, out_dtype=torch.float32
    )
    with use_backend("triton"):
        result = packed_linear(x, packed, scale, zero_point, bias, **arguments, out_dtype=torch.float32)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("split", [1, 2, 8])
def test_every_split_gives_the_same_integers_and_nearly_the_same_groups(split: int) -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=32)
    codes, x = codes_of(4, 64, 1024), codes_of(8, 5, 1024, seed=1)
    layout = TileLayout(4, 32)
    scale = torch.rand(64, 32, device=DEVICE) + 0.1
    token_scale = torch.rand(5, 1, device=DEVICE)
    result = packed_product_triton(
        x,
        token_scale,
        to_tiles(codes, layout),
        scale,
        None,
        None,
        layout,
        False,
        torch.float32,
        GemmConfig(64, 16, split),
    )
    weight = dequantize(codes, scale, None, scheme).double()
    expected = (x.double() @ weight.t() * token_scale).float()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-2)


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float16]),
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
    with use_backend("triton"):
        codes, scale = quantize_activations(x.to(DEVICE), scheme)
    expected_codes, expected_scale = quantize_activations_reference(x, scheme)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu(), expected_codes)
