"""Facts of accelerators and nodes, from `configs/gpus.yaml`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import yaml

from qatapult.trainer.recipe.errors import UserError

GB = 1e9
_NODE = re.compile(r"(?:(\d+)\s*[x×*]\s*)?([A-Za-z][\w.-]*)")


@dataclass(frozen=True)
class Gpu:
    """An accelerator: operations or bytes a second, memory in bytes, price in US dollars an hour."""

    name: str
    memory: float
    flops: float
    int8_ops: float
    bandwidth: float
    link: float
    host_link: float
    price: float
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether this stands for a process on the main processor."""
        return self.name == "CPU"


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Attributes:
        gpu: the accelerator.
        gpus: accelerators a node.
        nodes: number of nodes.
        network: a GPU's share of the network between nodes, bytes a second, one direction.
        host_memory: main memory a node, bytes.
        host_bandwidth: bandwidth of the main memory, bytes a second.
        price: US dollars a GPU-hour.
        price_is_default: whether the price is the data file's guess rather than the user's figure.
    """

    gpu: Gpu
    gpus: int
    nodes: int
    network: float
    host_memory: float
    host_bandwidth: float
    price: float
    price_is_default: bool

    @property
    def world(self) -> int:
        """Number of processes: one a GPU."""
        return self.gpus * self.nodes

    @property
    def bus(self) -> float:
        """Bandwidth of the slowest link in a ring over all ranks, bytes a second."""
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.network)

    def describe(self) -> str:
        """`8 × A100-80GB`, `16 nodes of 8 × A100-80GB`."""
        node = f"{self.gpus} × {self.gpu.name}"
        return node if self.nodes == 1 else f"{self.nodes} nodes of {node}"


def parse_cluster(node: str, nodes: int = 1, price: float | None = None) -> Cluster:
    """A cluster from what the user says of it.

    Args:
        node: `8xA100-80GB`, `A100-80GB` (one of them), or `2xCPU` (two processes on this machine).
        nodes: number of such nodes.
        price: US dollars a GPU-hour; the data file's default if absent.

    Raises:
        UserError: for an unknown GPU, no GPU, no node, or a negative price.
    """
    found = _NODE.fullmatch(node.strip())
    if found is None:
        raise UserError(f"--node {node!r} is not COUNTxGPU, such as 8xA100-80GB")
    count = int(found.group(1) or 1)
    if count < 1 or nodes < 1:
        raise UserError(f"--node {node!r} --nodes {nodes}: a cluster has at least one GPU and one node")
    if price is not None and price < 0:
        raise UserError(f"--price {price:g} is negative; give US dollars a GPU-hour, such as 2.50")
    gpu = find_gpu(found.group(2))
    defaults = _facts()["defaults"]
    host_memory = psutil.virtual_memory().total if gpu.is_cpu else defaults["host_memory_gb"] * GB
    return Cluster(
        gpu=gpu,
        gpus=count,
        nodes=nodes,
        network=defaults["network_gbs"] * GB,
        host_memory=host_memory,
        host_bandwidth=defaults["host_bandwidth_gbs"] * GB,
        price=gpu.price if price is None else price,
        price_is_default=price is None,
    )


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, or by its name without the memory where that is unambiguous (`H200`).

    Raises:
        UserError: for an unknown or ambiguous name.
    """
    if name.upper() == "CPU":
        return _this_processor()
    table = _facts()["gpus"]
    wanted = name.upper().removeprefix("NVIDIA-")
    if wanted in table:
        return _gpu(wanted, table[wanted])
    matches = [known for known in table if known.startswith(f"{wanted}-")]
    if len(matches) == 1:
        return _gpu(matches[0], table[matches[0]])
    if matches:
        raise UserError(f"GPU {name!r} is ambiguous: {' or '.join(matches)}")
    nearest = difflib.get_close_matches(wanted, table, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(f"unknown GPU {name!r}; {hint}known are {', '.join([*table, 'CPU'])}")


@cache
def _facts() -> dict[str, Any]:
    text = (files("qatapult.configs") / "gpus.yaml").read_text(encoding="utf-8")
    facts: dict[str, Any] = yaml.safe_load(text)
    return facts


def _gpu(name: str, facts: dict[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        memory=facts["memory_gb"] * GB * _facts()["defaults"]["usable"],
        flops=facts["bf16"] * 1e12,
        int8_ops=facts["int8"] * 1e12,
        bandwidth=facts["bandwidth_gbs"] * GB,
        link=facts["link_gbs"] * GB,
        host_link=facts["host_gbs"] * GB,
        price=facts["price"],
        source=facts["source"],
    )


def _this_processor() -> Gpu:
    """This machine's processor, at a rough 64 fp32 GFLOP a core and second; calibration measures it."""
    cores = psutil.cpu_count(logical=False) or 1
    return Gpu(
        name="CPU",
        memory=psutil.virtual_memory().total,
        flops=cores * 32e9 * 2,
        int8_ops=cores * 64e9 * 2,
        bandwidth=20 * GB,
        link=2 * GB,
        host_link=20 * GB,
        price=0.0,
        source="this machine",
    )


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets of this machine's processor, as Linux names them; none where that cannot be read."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return frozenset()
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
