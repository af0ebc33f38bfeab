"""Products on packed weights against float64, for every scheme the project packs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatapult.kernels import (
    Scheme,
    choose_range,
    pack,
    packed_linear,
    prepare_weight,
    quantize,
    unpack,
)
from qatapult.kernels.int_gemm import vnni
from qatapult.kernels.int_gemm.reference import packed_linear_reference
from qatapult.kernels.int_gemm.weights import PreparedWeight, prepare_unpacked

TOKENS = Scheme(granularity="token")
SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=8, symmetric=False),
    Scheme(bits=8, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=4),
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=4, granularity="group", group_size=64),
    Scheme(bits=4, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=3),
    Scheme(bits=3, granularity="group", group_size=64, symmetric=False),
    Scheme(bits=2, granularity="group", group_size=64, grid="stretched"),
    Scheme(bits=2, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=1.58, range_method="absmean"),
    Scheme(bits=1, grid="stretched", granularity="group", group_size=64),
]


def packed_weight(scheme: Scheme, rows: int, features: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows * features)
    weight = torch.randn(rows, features, generator=generator) + 0.2
    scale, zero_point = choose_range(weight, scheme)
    return pack(quantize(weight, scale, zero_point, scheme), scheme), scale, zero_point


@pytest.mark.parametrize("path", ["float", "int_mm", "compiled"])
@pytest.mark.parametrize("activations", [TOKENS, None], ids=["A8", "A16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_equals_the_float64_product(
    scheme: Scheme, activations: Scheme | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: path != "float")
    if path == "int_mm":
        monkeypatch.setattr(vnni, "available", lambda: False)
    features = 192 if scheme.granularity == "group" else 197
    packed, scale, zero_point = packed_weight(scheme, 33, features)
    x = torch.randn(2, 7, features, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(33).float()
    arguments = {"weight_scheme": scheme, "activation_scheme": activations, "features": features}
    result = packed_linear(x, packed, scale, zero_point, bias, **arguments)
    expected = packed_linear_reference(x, packed, scale, zero_point, bias, **arguments)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", [TOKENS, None], ids=["A8", "A16"])
def test_half_precision_in_and_out(dtype: torch.dtype, activations: Scheme | None) -> None:
    scheme = SCHEMES[6]
    packed, scale, zero_point = packed_weight(scheme, 24, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    arguments = {"weight_scheme": scheme, "activation_scheme": activations, "features": 128}
    result = packed_linear(x, packed, scale, zero_point, **arguments)
    expected = packed_linear_reference(x, packed, scale, zero_point, None, **arguments)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
    wide = packed_linear(x, packed, scale, zero_point, **arguments, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.to(dtype), expected)


@pytest.mark.parametrize("vnni", [False, True])
def test_eight_bit_codes_are_summed_exactly_over_a_long_row(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums lie beyond 2^24, where one fp32 GEMM would round them."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    scheme, features = Scheme(bits=8), 4097
    codes = torch.full((2, features), 127, dtype=torch.int8)
    codes[1, 0] = 126
    weight = prepare_weight(
        pack(codes, scheme), torch.ones(2, 1), scheme=scheme, features=features, activation_scheme=TOKENS
    )
    x = torch.full((1, features), 127.5)
    result = packed_linear(x, weight, activation_scheme=TOKENS, out_dtype=torch.float64)
    assert result.tolist() == [
        [float(torch.tensor(127 * 127 * features).float())] * 1
        + [float(torch.tensor(127 * 127 * features - 127).float())]
    ]


@pytest.mark.skipif(not vnni.available(), reason="no AVX512-VNNI, or no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_the_product_of_training_and_the_served_one_are_the_same_bits(
    scheme: Scheme, tokens: int, dtype: torch.dtype
) -> None:
    """Two implementations, oneDNN on bytes and ours on packed codes: inputs that differ in one rounding would
    fall on other int8 codes in the next layer."""
    packed, scale, zero_point = packed_weight(scheme, 90, 192)
    x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias = torch.randn(90, generator=torch.Generator().manual_seed(5))
    codes = unpack(packed, scheme, 192)
    once = prepare_unpacked(codes, scale, zero_point, scheme, TOKENS)
    served = prepare_weight(packed, scale, zero_point, scheme=scheme, features=192, activation_scheme=TOKENS)
    assert (once.layout, served.layout) == ("int8", "vnni")
    expected = packed_linear(x, once, bias=bias, activation_scheme=TOKENS)
    assert torch.equal(packed_linear(x, served, bias=bias, activation_scheme=TOKENS), expected)


def test_a_prepared_weight_gives_the_same_and_knows_its_size() -> None:
    scheme = Scheme(bits=4)
    packed, scale, zero_point = packed_weight(scheme, 8, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    prepared = prepare_weight(packed, scale, scheme=scheme, features=64, activation_scheme=TOKENS)
    assert isinstance(prepared, PreparedWeight)
    assert prepared.out_features == 8
    assert prepared.nbytes >= 8 * 64
    direct = packed_linear(
        x, packed, scale, zero_point, weight_scheme=scheme, activation_scheme=TOKENS, features=64
    )
    assert torch.equal(packed_linear(x, prepared, activation_scheme=TOKENS), direct)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_few_and_many_tokens_agree(scheme: Scheme, tokens: int) -> None:
    packed, scale, zero_point = packed_weight(scheme, 19, 320)
    prepared = prepare_weight(
        packed, scale, zero_point, scheme=scheme, features=320, activation_scheme=TOKENS
    )
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(3))
    many = packed_linear(x, prepared, activation_scheme=TOKENS)[:tokens]
    few = packed_linear(x[:tokens], prepared, activation_scheme=TOKENS)
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_rows() -> None:
    packed, scale, _ = packed_weight(SCHEMES[3], 8, 64)
    prepared = prepare_weight(packed, scale, scheme=SCHEMES[3], features=64, activation_scheme=TOKENS)
    assert packed_linear(torch.empty(2, 0, 64), prepared, activation_scheme=TOKENS).shape == (2, 0, 8)


def test_refusals_name_what_would_be_right() -> None:
    scheme = SCHEMES[3]
    packed, scale, _ = packed_weight(scheme, 8, 64)
    prepared = prepare_weight(packed, scale, scheme=scheme, features=64, activation_scheme=TOKENS)
    with pytest.raises(ValueError, match="63 features; the weight has 64"):
        packed_linear(torch.ones(1, 63), prepared, activation_scheme=TOKENS)
    with pytest.raises(ValueError, match="prepared for quantized activations"):
        packed_linear(torch.ones(1, 64), prepared)
    with pytest.raises(ValueError, match="PreparedWeight"):
        packed_linear(torch.ones(1, 64), packed)
    with pytest.raises(ValueError, match="needs \\(8, 1\\)"):
        prepare_weight(packed, scale[:4], scheme=scheme, features=64)
    with pytest.raises(ValueError, match="symmetric=False only"):
        prepare_weight(packed, scale, torch.zeros_like(scale), scheme=scheme, features=64)


def test_the_operator_passes_opcheck() -> None:
    packed, scale, _ = packed_weight(SCHEMES[3], 8, 64)
    weight = prepare_weight(packed, scale, scheme=SCHEMES[3], features=64, activation_scheme=TOKENS)
    codes = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    arguments = (
        codes,
        torch.rand(3, 1),
        weight.operand,
        weight.scale,
        None,
        torch.rand(8),
        weight.few,
        weight.few_scale,
    )
    width = weight.exact_span
    torch.library.opcheck(
        torch.ops.qatapult.packed_product, (*arguments, weight.layout, 4, width, False, torch.bfloat16)
    )
