"""Where the kernels' tests run.

On a machine with CUDA, `device` is `cpu` and `cuda` in turn and Triton kernels run compiled. Without, they run
under Triton's interpreter, which has to be chosen before they are imported: hence the assignment at the top.

Fixtures for every kernel's tests:

* `device`: `cpu`, and `cuda` where there is one.
* `backend`: a `(backend, device)` pair that can run here, already forced by `use_backend`; ask for it to run a test
  on the reference, the compiled CPU path and Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

from qatapult.kernels import use_backend  # noqa: E402

DEVICES = ("cpu", "cuda") if HAS_CUDA else ("cpu",)


class Target(NamedTuple):
    """A backend and the device that its tensors lie on."""

    backend: str
    device: str


def _targets() -> list[Target]:
    targets = [Target("reference", "cpu"), Target("cpu", "cpu")]
    if HAS_CUDA:
        targets.append(Target("reference", "cuda"))
    if find_spec("triton"):
        targets.append(Target("triton", "cuda" if HAS_CUDA else "cpu"))
    return targets


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A device that this machine has."""
    return str(request.param)


@pytest.fixture(params=_targets(), ids=lambda target: f"{target.backend}-{target.device}")
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A backend that this machine can run, forced while the test runs."""
    with use_backend(request.param.backend):
        yield request.param
