"""Fake-quantization inside the rest of torch: compile, autocast, checkpointing, transforms, sharding."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qatapult.kernels import (
    Scheme,
    choose_range,
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    quantize_dynamic,
)

WEIGHT = Scheme(bits=4, granularity="group", group_size=8)
ASYMMETRIC = Scheme(bits=4, symmetric=False)
TOKEN = Scheme(bits=8, granularity="token")


class Layer(torch.nn.Module):
    """A linear layer with learned scales and per-token activations, as a user would write it."""

    def __init__(self, scheme: Scheme = WEIGHT, features: int = 16) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = torch.nn.Parameter(torch.randn(8, features, generator=torch.Generator().manual_seed(0)))
        scale, zero_point = choose_range(self.weight, scheme)
        self.scale = torch.nn.Parameter(scale)
        self.zero_point = None if zero_point is None else torch.nn.Parameter(zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = fake_quantize(self.weight, self.scale, self.zero_point, scheme=self.scheme)
        return torch.nn.functional.linear(fake_quantize_dynamic(x, TOKEN), weight)


def loss_and_gradients(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    loss = layer(x).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in layer.parameters())]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", [WEIGHT, ASYMMETRIC])
def test_torch_compile_without_breaks(x: torch.Tensor, device: str, scheme: Scheme) -> None:
    layer, x = Layer(scheme).to(device), x.to(device)
    eager = loss_and_gradients(layer, x)
    compiled = loss_and_gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
def test_torch_compile_with_inductor(x: torch.Tensor, device: str) -> None:
    layer, x = Layer().to(device), x.to(device)
    eager = loss_and_gradients(layer, x)
    torch.testing.assert_close(loss_and_gradients(torch.compile(layer, fullgraph=True), x), eager)


def test_autocast_keeps_fp32_weights(x: torch.Tensor, device: str) -> None:
    layer = Layer().to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert fake_quantize(layer.weight, layer.scale, scheme=WEIGHT).dtype == torch.float32
        loss = layer(x.to(device)).float().sum()
    loss.backward()
    assert layer.weight.grad.dtype == layer.scale.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(x: torch.Tensor, reentrant: bool) -> None:
    layer = Layer()
    plain = loss_and_gradients(layer, x)
    layer.zero_grad()
    checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant).square().mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in layer.parameters()], plain[1:])


def test_functional_gradients(x: torch.Tensor) -> None:
    layer = Layer(ASYMMETRIC)
    expected = loss_and_gradients(layer, x)[1:]

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, x).square().mean()

    gradients = torch.func.grad(loss)(dict(layer.named_parameters()))
    torch.testing.assert_close(list(gradients.values()), expected)


def test_vmap_over_an_ensemble(x: torch.Tensor) -> None:
    weights, inputs = torch.randn(3, 8, 16), torch.randn(3, 4, 16)
    scales = torch.stack([choose_range(weight, WEIGHT)[0] for weight in weights])

    def member(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        quantized = fake_quantize(weight, scale, scheme=WEIGHT)
        return (fake_quantize_dynamic(x, TOKEN) @ quantized.T).square().sum()

    together = torch.vmap(torch.func.grad(member, argnums=(0, 1)))(weights, scales, inputs)
    alone = [
        torch.func.grad(member, argnums=(0, 1))(*group) for group in zip(weights, scales, inputs, strict=True)
    ]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*alone, strict=True))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_saved_beyond_the_inputs(dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(8, 16, device=device, dtype=dtype, requires_grad=True)
    scale, zero_point = (part.requires_grad_() for part in choose_range(weight, ASYMMETRIC))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(weight, scale, zero_point, scheme=ASYMMETRIC)
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (weight, scale, zero_point)}
        saved.clear()
        fake_quantize_dynamic(weight, TOKEN)
        assert saved == []


def test_weights_that_are_empty_outside_the_forward(x: torch.Tensor) -> None:
    """ZeRO-3 empties `weight.data` after the forward and fills it again before the module's backward."""
    layer = Layer()
    expected = loss_and_gradients(layer, x)
    full = {name: parameter.data for name, parameter in layer.named_parameters()}

    def release(*_: object) -> None:
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)

    def gather(*_: object) -> None:
        for name, parameter in layer.named_parameters():
            parameter.data = full[name]

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(release)
    layer.register_full_backward_pre_hook(gather)
    release()
    layer.zero_grad()
    loss = layer(x).square().mean()
    assert layer.weight.numel() == 0
    loss.backward()
    torch.testing.assert_close([loss.detach(), *(p.grad for p in layer.parameters())], expected)


@pytest.mark.parametrize(
    "scheme", [WEIGHT, ASYMMETRIC, Scheme(bits=1, grid="stretched")], ids=Scheme.describe
)
def test_operators_pass_opcheck(backend, scheme: Scheme) -> None:  # type: ignore[no-untyped-def]
    from qatapult.kernels.fake_quant.spec import Grid, RangeRule

    x = torch.randn(3, 16, device=backend.device, requires_grad=True)
    scale, zero_point = (None if t is None else t.requires_grad_() for t in choose_range(x, scheme))
    numbers, ops = Grid.of(scheme), torch.ops.qatapult
    quantize(x, scale, zero_point, scheme), quantize_dynamic(x, TOKEN)
    torch.library.opcheck(ops.quantize.default, (x.detach(), scale.detach(), zero_point, *numbers))
    for rule in ("lsq", "ste"):
        arguments = (x, scale, zero_point, *numbers, rule, 0.5)
        torch.library.opcheck(ops.fake_quantize.default, arguments)
        detached = [None if t is None else t.detach() for t in (x, x, scale, zero_point)]
        torch.library.opcheck(ops.fake_quantize_backward.default, (*detached, *numbers, rule, 0.5))
    dynamic = (scheme.block_size(16), *numbers, *RangeRule.of(scheme))
    torch.library.opcheck(ops.fake_quantize_dynamic.default, (x, *dynamic))
    torch.library.opcheck(ops.quantize_dynamic.default, (x.detach(), *dynamic))


SHARDED = """
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from qatapult.kernels import Scheme, choose_range, fake_quantize, quantize
    from test_fake_quant_composition import Layer, loss_and_gradients

    dist.init_process_group("gloo")
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradients(Layer(), x)
    layer = Layer()
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert isinstance(layer.weight, DTensor) and isinstance(layer.scale, DTensor)
    loss, *gradients = loss_and_gradients(layer, x)
    for gradient, right in zip([loss, *(g.full_tensor() for g in gradients)], expected, strict=True):
        torch.testing.assert_close(gradient, right)

    for scheme in (Scheme(bits=4), Scheme(bits=4, granularity="group", group_size=4, symmetric=False),
                   Scheme(bits=8, granularity="tensor")):
        for rule in ("lsq", "ste"):
            weight, grad = x.repeat(2, 1), torch.ones(8, 16)
            plain = [None if t is None else t.clone() for t in (weight, *choose_range(weight, scheme))]
            mesh, rows = layer.weight.device_mesh, [Shard(0)]
            placed = [t if t is None else distribute_tensor(t, mesh, [Replicate()] if t.ndim == 1 else rows)
                      for t in plain]
            codes = quantize(*placed, scheme)
            assert codes.placements == (Shard(0),)
            assert torch.equal(codes.full_tensor(), quantize(*plain, scheme))
            for tensors in (plain, placed):
                [t.requires_grad_() for t in tensors if t is not None]
                fake_quantize(*tensors, scheme=scheme, gradient=rule).sum().backward()
            for tensor, right in zip(placed, plain, strict=True):
                if right is not None and right.grad is not None:
                    torch.testing.assert_close(tensor.grad.full_tensor(), right.grad)
    dist.destroy_process_group()
    print("sharded as expected")
"""


def test_fsdp2_on_two_processes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "sharded.py"
    here = __file__.rsplit("/", 1)[0]
    script.write_text(f"import sys; sys.path.insert(0, {here!r})\n" + textwrap.dedent(SHARDED))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded as expected") == 2
