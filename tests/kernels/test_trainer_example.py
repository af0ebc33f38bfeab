"""The example that adds QAT to a plain transformers `Trainer` trains, and is as short as the docs say."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qatapult.kernels import choose_range

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer_qat.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = spec_from_file_location("trainer_qat_example", EXAMPLE)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_training_learns_on_the_grid(example: ModuleType) -> None:
    model, losses = example.main(["--steps", "30"])
    assert losses[-1] < 0.7 * losses[0]
    layer = model.model.layers[0].mlp.up_proj
    scale = layer.parametrizations.weight[0].scale
    levels = layer.weight.reshape(scale.numel(), -1) / scale.reshape(-1, 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.min() >= -8.001
    assert levels.max() <= 7.001
    untrained, _ = choose_range(layer.parametrizations.weight.original, example.WEIGHTS)
    assert not torch.allclose(scale, untrained)


def test_is_under_twenty_lines(example: ModuleType) -> None:
    lines = [
        line
        for name in ("FakeQuantized", "add_qat")
        for line in inspect.getsource(getattr(example, name)).splitlines()
    ]
    assert len([line for line in lines if line.strip()]) < 20
