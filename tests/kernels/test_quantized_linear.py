"""The integer forward equals the fake-quantized one, and so do all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qatapult.kernels import (
    Scheme,
    choose_range,
    pack,
    packed_linear,
    quantize,
    quantized_linear,
    use_backend,
)
from qatapult.kernels.quant_linear.reference import fake_quantized_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = Scheme(granularity="token")
SCHEMES = [
    Scheme(bits=4),
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=8, symmetric=False),
    Scheme(bits=4, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=3, granularity="group", group_size=64),
    Scheme(bits=2, grid="stretched"),
    Scheme(bits=1.58, range_method="absmean"),
    Scheme(bits=1, grid="stretched"),
]


def layer(scheme: Scheme, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(24, 64, generator=generator)
    scale, zero_point = choose_range(weight * 0.9, scheme)
    tensors = {
        "x": torch.randn(2, 5, 64, generator=generator).to(dtype),
        "weight": weight,
        "weight_scale": scale,
        "weight_zero_point": zero_point,
        "bias": torch.randn(24, generator=generator),
    }
    return {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}


def run(
    mode: str, scheme: Scheme, gradient: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Any]]:
    """`mode` is one of `quantized_linear`, or `composed` for the plain composition of its parts."""
    tensors = layer(scheme, dtype)
    grids: dict[str, Any] = {"weight_scheme": scheme, "activation_scheme": TOKENS, "gradient": gradient}
    if mode == "composed":
        y = fake_quantized_linear(**tensors, **grids)  # type: ignore[arg-type]
    else:
        y = quantized_linear(**tensors, **grids, mode=mode)  # type: ignore[arg-type]
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * incoming.to(y.dtype)).sum().backward()
    return y.detach(), {name: t.grad for name, t in tensors.items() if t is not None}


@pytest.mark.parametrize("mode", ["integer", "fake"])
@pytest.mark.parametrize("gradient", ["lsq", "pact", "ste"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_forward_and_backward_are_those_of_the_composition(scheme: Scheme, gradient: str, mode: str) -> None:
    y, gradients = run(mode, scheme, gradient)
    expected, expected_gradients = run("composed", scheme, gradient)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, grad in expected_gradients.items():
        if grad is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(
                gradients[name], grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_training_runs_on_the_arithmetic_that_is_served(scheme: Scheme) -> None:
    tensors = layer(scheme)
    y = quantized_linear(**tensors, weight_scheme=scheme, activation_scheme=TOKENS, mode="integer")  # type: ignore[arg-type]
    scale, zero_point = tensors["weight_scale"], tensors["weight_zero_point"]
    codes = quantize(tensors["weight"], scale, zero_point, scheme)  # type: ignore[arg-type]
    served = packed_linear(
        tensors["x"],  # type: ignore[arg-type]
        pack(codes, scheme),
        scale.detach(),  # type: ignore[union-attr]
        None if zero_point is None else zero_point.detach(),
        tensors["bias"].detach(),  # type: ignore[union-attr]
        weight_scheme=scheme,
        activation_scheme=TOKENS,
        features=64,
    )
    assert torch.equal(y, served)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_the_triton_forward_agrees(scheme: Scheme) -> None:
    pytest.importorskip("triton")
    expected, _ = run("integer", scheme, "lsq")
    tensors = {name: None if t is None else t.detach().to(DEVICE) for name, t in layer(scheme).items()}
    with use_backend("triton"):
        y = quantized_linear(**tensors, weight_scheme=scheme, activation_scheme=TOKENS, mode="integer")  # type: ignore[arg-type]
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_the_fake_forward_under_bf16_equals_the_composition_bit_for_bit(scheme: Scheme) -> None:
    y, gradients = run("fake", scheme, "lsq", torch.bfloat16)
    expected, expected_gradients = run("composed", scheme, "lsq", torch.bfloat16)
    assert torch.equal(y, expected)
    assert torch.equal(gradients["x"], expected_gradients["x"])
    torch.testing.assert_close(
        gradients["weight_scale"], expected_gradients["weight_scale"], rtol=2e-2, atol=1e-3
    )


@pytest.mark.parametrize("mode", ["integer", "fake"])
def test_saves_only_its_inputs_for_backward(mode: str) -> None:
    tensors = layer(SCHEMES[0], torch.bfloat16)
    saved: list[int] = []
    own = {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        quantized_linear(**tensors, weight_scheme=SCHEMES[0], activation_scheme=TOKENS, mode=mode)  # type: ignore[arg-type]
    assert saved
    assert set(saved) <= own


def test_half_precision_and_autocast_set_the_output_dtype() -> None:
    y, gradients = run("integer", SCHEMES[0], "lsq", torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert gradients["x"].dtype == torch.bfloat16
    assert gradients["weight"].dtype == torch.float32
    expected, _ = run("fake", SCHEMES[0], "lsq")
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    tensors = layer(SCHEMES[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(**tensors, weight_scheme=SCHEMES[0], activation_scheme=TOKENS)  # type: ignore[arg-type]
    assert y.dtype == torch.bfloat16


def test_passes_opcheck_and_torch_compile() -> None:
    scheme = SCHEMES[3]
    tensors = layer(scheme)
    inputs = {name: t for name, t in tensors.items() if name != "x"}
    x = tensors["x"].detach().reshape(-1, 64).requires_grad_()  # type: ignore[union-attr]
    quantized_linear(x, **inputs, weight_scheme=scheme, activation_scheme=TOKENS, mode="integer")  # type: ignore[arg-type]
    numbers = (4.0, "integer", 32, 8, "float32", "lsq")
    for integer in (True, False):
        torch.library.opcheck(torch.ops.qatapult.quantized_linear, (x, *inputs.values(), *numbers, integer))
    detached = [tensor.detach() for tensor in (x, *inputs.values()) if tensor is not inputs["bias"]]
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (torch.randn(10, 24), *detached, *numbers, *needs)
        torch.library.opcheck(torch.ops.qatapult.quantized_linear_backward, arguments)


def test_refuses_what_it_cannot_compute() -> None:
    tensors = layer(SCHEMES[0])
    with pytest.raises(ValueError, match="mode='fast'"):
        quantized_linear(**tensors, weight_scheme=SCHEMES[0], activation_scheme=TOKENS, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity='token'"):
        quantized_linear(**tensors, weight_scheme=SCHEMES[0], activation_scheme=Scheme())  # type: ignore[arg-type]
    tensors["x"] = torch.ones(2, 63)
    with pytest.raises(ValueError, match="63 features; the weight has 64"):
        quantized_linear(**tensors, weight_scheme=SCHEMES[0], activation_scheme=TOKENS)  # type: ignore[arg-type]
