"""The kernels' shipped configurations, for ahead-of-time compilation (`kernels.common.aot`).

python -m qatapult.kernels.common.aot qatapult.kernels.int_gemm.shipped
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qatapult.kernels.common.aot import AotCase
from qatapult.kernels.int_gemm.configs import (
    BUCKETS,
    Config,
    GemmConfig,
    Problem,
    VectorConfig,
    default_config,
    read_table,
)
from qatapult.kernels.int_gemm.tiles import TileLayout
from qatapult.kernels.int_gemm.triton_kernel import packed_gemm
from qatapult.kernels.int_gemm.triton_vector import packed_gemv


@dataclass(frozen=True)
class Kind:
    """What a binary is specialised to besides its block sizes."""

    bits: int
    group: int = 0
    activations: str = "i8"
    half: bool = False
    shift: bool = False

    @property
    def name(self) -> str:
        parts = [
            f"W{self.bits}A{8 if self.activations == 'i8' else self.activations}",
            f"g{self.group}" if self.group else "channel",
        ]
        return " ".join(parts + ["stretched"] * self.half + ["asymmetric"] * self.shift)


#: Kinds that are compiled in every configuration of the rule and of the tables.
MAIN_KINDS = (Kind(4), Kind(4, 128))
#: Kinds that are compiled for decode and for prefill once.
OTHER_KINDS = (
    Kind(8),
    Kind(8, 128, shift=True),
    Kind(3),
    Kind(2, 64, half=True),
    Kind(1, half=True),
    Kind(4, 32, shift=True),
    Kind(4, 0, "bf16"),
    Kind(4, 128, "fp16", shift=True),
    Kind(2, 64, "bf16", half=True),
    Kind(3, 64, "fp16"),
    Kind(8, 0, "bf16"),
)


def aot_cases() -> list[AotCase]:
    """Every configuration of the main kinds, one of each other kind; what a table has measured, for its GPU alone."""
    cases = []
    for kind in MAIN_KINDS:
        rules: set[Config] = {_rule(bucket, kind) for bucket in BUCKETS} | {VectorConfig()}
        cases += [_config_case(kind, config) for config in sorted(rules, key=str)]
        for table in sorted((Path(__file__).parent / "tables").glob("sm_*.json")):
            measured = {config for p, config in read_table(table) if bool(p.group) == bool(kind.group)}
            own = (int(table.stem.removeprefix("sm_")),)
            cases += [
                replace(_config_case(kind, config), capabilities=own)
                for config in sorted(measured - rules, key=str)
            ]
    cases += [_vector_case(Kind(3, 64), VectorConfig()), _vector_case(Kind(2, 64, half=True), VectorConfig())]
    return cases + [_case(kind, _rule(BUCKETS[i % 2 * 5], kind)) for i, kind in enumerate(OTHER_KINDS)]


def _config_case(kind: Kind, config: Config) -> AotCase:
    return _vector_case(kind, config) if isinstance(config, VectorConfig) else _case(kind, config)


def _rule(bucket: int, kind: Kind) -> GemmConfig:
    problem = Problem(bucket, 4096, 4096, kind.bits, kind.group, 8 if kind.activations == "i8" else 16)
    return default_config(problem, 90, TileLayout(kind.bits, 64).unit)


def _case(kind: Kind, config: GemmConfig) -> AotCase:
    integer = kind.activations == "i8"
    layout = TileLayout(kind.bits, 32 if kind.group == 32 else 64)
    fp32 = ("token_scale", "scale", "shift")
    kinds = {
        "x": kind.activations,
        "w": "i8",
        "y": "bf16",
        "row_sum": "i32",
        "bias": "bf16",
        "counter": "i32",
    }
    kinds |= dict.fromkeys(fp32, "fp32") | {"partial": "i32" if integer and not kind.group else "fp32"}
    pointers = {name: f"*{dtype}" for name, dtype in kinds.items()}
    blocks = f"{config.block_n}×{config.block_m}×{config.split}"
    return AotCase(
        name=f"{kind.name} {blocks}, {config.warps} warps, {config.stages} stages",
        kernel=packed_gemm,
        signature=pointers | dict.fromkeys(("M", "N", "K", "rows", "units"), "i32"),
        constexprs={
            "BITS": kind.bits,
            "WIDTH": layout.slice_width,
            "GROUP": kind.group,
            "HALF": int(kind.half),
            "INTEGER": integer,
            "HAS_SHIFT": kind.shift,
            "HAS_BIAS": False,
            "RAW": False,
            "EVEN_K": True,
            "SPAN": layout.span(kind.group),
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "SPLIT": config.split,
            "RASTER": config.raster,
            "WHOLE": integer and layout.takes_whole_units(kind.group) and not (kind.shift and kind.group),
        },
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=(*pointers, "N", "K", "rows"),
    )


def _vector_case(kind: Kind, config: VectorConfig) -> AotCase:
    """The product with one token, which has no tensor cores to find in its code."""
    layout = TileLayout(kind.bits, 64)
    pointers = {
        "x": "*i32",
        "w": "*i32",
        "y": "*bf16",
        "token_scale": "*fp32",
        "scale": "*fp32",
        "bias": "*bf16",
    }
    return AotCase(
        name=f"{kind.name} one token {config.rows}×{config.units}, {config.warps} warps",
        kernel=packed_gemv,
        signature=pointers | dict.fromkeys(("N", "rows", "units"), "i32"),
        constexprs={
            "BITS": kind.bits,
            "WIDTH": layout.slice_width,
            "GROUP": kind.group,
            "HALF": int(kind.half),
            "HAS_BIAS": False,
            "RAW": False,
            "SPAN": layout.span(kind.group),
            "ROWS": config.rows,
            "UNITS": config.units,
        },
        num_warps=config.warps,
        aligned=(*pointers, "N", "rows"),
    )
