"""Which block sizes a product runs with: measured tables, and a rule where nothing was measured.

A table is a JSON file of rows, one per measured shape (`sm_90.json`), which the sweep of
`benchmarks/inference/gemm.py` writes. The choice is a function of the shape and the table alone, so that
all ranks of a job and all runs choose alike; nothing is timed behind the caller's back. `pin_table` puts
another file in place.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

#: Upper ends of the ranges of M that share a configuration; beyond the last, all do.
BUCKETS = (16, 32, 64, 128, 256, 1024, 4096)
#: Streaming multiprocessors: A100, H100 and H200. Constants, for the choice must not depend on the machine.
PROCESSORS = {80: 108, 90: 132}
#: Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class GemmConfig:
    """A program's block and how programs share the work.

    Attributes:
        block_n: output channels of a program.
        block_m: tokens of a program.
        split: programs that share K.
        warps: warps of a program.
        stages: depth of the software pipeline.
        raster: blocks of channels worked on together, for the second-level cache.
    """

    block_n: int
    block_m: int
    split: int = 1
    warps: int = 4
    stages: int = 4
    raster: int = 8


@dataclass(frozen=True)
class VectorConfig:
    """How the product with one token is cut (`triton_vector.py`).

    Attributes:
        rows: output channels of a program.
        units: units along K that it loads together.
        warps: warps of a program.
    """

    rows: int = 4
    units: int = 32
    warps: int = 4


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for; `group` is 0 for scales per channel, `activation_bits` 8 or 16."""

    m: int
    n: int
    k: int
    bits: int
    group: int
    activation_bits: int

    @property
    def bucket(self) -> int:
        """The range of M that this one falls into."""
        return next((bucket for bucket in BUCKETS if self.m <= bucket), BUCKETS[-1])


#: The folder of the shipped tables.
_SHIPPED = Path(__file__).parent / "tables"
_pinned: list[Path] = []


def pin_table(path: str | Path | None) -> None:
    """Use the table in this file for all products from now on; None goes back to the shipped ones.

    Raises:
        ValueError: if the file holds no such table.
    """
    _pinned.clear()
    if path is not None:
        read_table(Path(path))
        _pinned.append(Path(path))


#: What the tables hold.
Config = GemmConfig | VectorConfig


def choose_config(problem: Problem, capability: int, unit: int, vector: bool = False) -> Config:
    """The measured configuration of the nearest shape of the same kind, else a rule.

    Args:
        problem: the product.
        capability: compute capability of the device: 80, 90.
        unit: codes along K that are loaded together; K is split between units.
        vector: whether the kernel for one token can be taken.
    """
    return _chosen(_pinned[0] if _pinned else None, problem, capability, unit, vector)


# Looking through a table takes longer than a product of few tokens.
@lru_cache(maxsize=4096)
def _chosen(pinned: Path | None, problem: Problem, capability: int, unit: int, vector: bool) -> Config:
    rows = [
        (_distance(shape, problem), config)
        for shape, config in read_table(pinned or _SHIPPED / f"sm_{capability}.json")
        if (shape.bits, bool(shape.group), shape.activation_bits, shape.bucket)
        == (problem.bits, bool(problem.group), problem.activation_bits, problem.bucket)
        and (vector or isinstance(config, GemmConfig))
    ]
    if not rows:
        return VectorConfig() if vector else default_config(problem, capability, unit)
    config = min(rows, key=lambda row: row[0])[1]
    if isinstance(config, VectorConfig):
        return config
    return GemmConfig(**asdict(config) | {"split": max(1, min(config.split, problem.k // unit))})


def _distance(measured: Problem, wanted: Problem) -> float:
    """How far two shapes lie apart, in logarithms; tokens of one bucket count little."""
    tokens = abs(math.log(measured.m / wanted.m))
    return abs(math.log(measured.n / wanted.n)) + abs(math.log(measured.k / wanted.k)) + 0.1 * tokens


def default_config(problem: Problem, capability: int, unit: int) -> GemmConfig:
    """A rule for shapes that no table covers: at decode, programs to fill the processors about four times."""
    if problem.bucket >= 256:
        # Scales of short groups, or of other widths than four bits, take registers that 128 tokens would spill.
        tokens = 64 if problem.group and (problem.group < 64 or problem.bits != 4) else 128
        return GemmConfig(128, tokens, 1, warps=8, stages=3)
    block_m = max(16, min(problem.bucket, 128))
    block_n = 128 if problem.n >= 8192 or block_m >= 64 else 64
    warps = 8 if block_n * block_m >= 128 * 128 else 4
    blocks = math.ceil(problem.n / block_n) * math.ceil(problem.m / block_m)
    wanted = PROCESSORS.get(capability, 108) * (4 if block_m <= 32 else 2) / blocks
    limit = max(1, problem.k // unit // 2)
    split = 2 ** max(0, min(4, round(math.log2(max(1.0, min(wanted, limit))))))
    return GemmConfig(block_n, block_m, split, warps=warps, stages=4)


@lru_cache(maxsize=4096)
def within_shared_memory(
    config: GemmConfig, unit: int, unit_bytes: int, slice_width: int, element: int, capability: int
) -> GemmConfig:
    """The configuration with as few tokens a program as its pipeline's buffers take to fit.

    A unit of fewer bits is more codes, and the tile of activations beside it grows with them. The estimate is what
    Triton allocates for fp32 activations, and above it for shorter ones.

    Args:
        config: as chosen by shape alone.
        unit: codes along K of a unit.
        unit_bytes: packed bytes of a row's unit.
        slice_width: codes along K of one product.
        element: bytes of an activation.
        capability: compute capability of the device.
    """
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    buffers = max(1, config.stages - (1 if element == 4 else 0))
    block_m = config.block_m
    while block_m > 16:
        tile = block_m * unit * element + config.block_n * unit_bytes
        if buffers * tile + config.block_n * slice_width * element <= limit:
            break
        block_m //= 2
    return replace(config, block_m=block_m)


def candidates(problem: Problem, unit: int) -> list[Config]:
    """Configurations worth measuring for a product: the sweep's list, pruned by shape.

    Blocks of 256 channels and limits on registers were measured on an H100 and never won (docs/performance).
    """
    splits = [s for s in (1, 2, 4, 8, 16) if s <= max(1, problem.k // unit // 2)]
    found: list[Config] = []
    if problem.m == 1 and problem.activation_bits == 8:
        found += [VectorConfig(*size) for size in itertools.product((4, 8, 16), (16, 32), (2, 4))]
    if problem.bucket <= 32:
        blocks = [(64, problem.bucket, 4), (128, problem.bucket, 4)]
        depths: tuple[int, ...] = (3, 5)
        splits = [s for s in splits if problem.n // 64 * s >= 32]
    elif problem.bucket <= 128:
        blocks, depths = [(64, 64, 4), (128, 64, 4), (64, problem.bucket, 4), (128, problem.bucket, 8)], (4,)
        splits = [s for s in splits if s <= 8]
    else:
        blocks = [(64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8)]
        depths = (3, 4)
        splits = [s for s in splits if s <= (4 if problem.bucket == 256 else 1)]
    axes = itertools.product(dict.fromkeys(blocks), splits, depths)
    return found + [
        GemmConfig(n, m, split, warps=warps, stages=stages) for (n, m, warps), split, stages in axes
    ]


def write_table(path: Path, rows: list[tuple[Problem, Config]]) -> None:
    """Store measured configurations, one a line; those of other problems that the file holds already stay."""
    held = dict(read_table(path)) if path.exists() else {}
    ordered = sorted((held | dict(rows)).items(), key=lambda row: str(row[0]))
    lines = [
        json.dumps({"problem": asdict(problem), "config": asdict(config)}) for problem, config in ordered
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    read_table.cache_clear()
    _chosen.cache_clear()


@cache
def read_table(path: Path) -> list[tuple[Problem, Config]]:
    """The rows of a table; none if a shipped table is missing.

    Raises:
        ValueError: if the file is missing or no such table.
    """
    if not path.exists():
        if path in _pinned or path.parent != _SHIPPED:
            raise ValueError(f"{path}: no such table of configurations")
        return []
    try:
        return [
            (
                Problem(**row["problem"]),
                (VectorConfig if "units" in row["config"] else GemmConfig)(**row["config"]),
            )
            for row in json.loads(path.read_text())
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error
