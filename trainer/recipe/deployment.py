"""The grids of deployment formats: a recipe that names its format is trained on exactly that grid."""

from __future__ import annotations

from typing import Any

from qatapult.kernels.scheme import Scheme

#: Group sizes of vLLM's mixed-precision kernels; a whole row is `granularity: channel`.
COMPRESSED_TENSORS_GROUPS = (32, 64, 128)

_GGUF_BLOCK: dict[str, Any] = {"granularity": "group", "group_size": 32, "scale_dtype": "float16"}
#: Weights' grid of each GGUF type: blocks of 32 that share an fp16 scale (Q4_1: and an fp16 minimum).
GGUF_GRIDS: dict[str, dict[str, Any]] = {
    "gguf-q4_0": {"bits": 4, "symmetric": True, **_GGUF_BLOCK},
    "gguf-q4_1": {"bits": 4, "symmetric": False, **_GGUF_BLOCK},
    "gguf-q8_0": {"bits": 8, "symmetric": True, **_GGUF_BLOCK},
}


def gguf_type(weights: Scheme) -> str | None:
    """Name of the GGUF type that stores a grid exactly, such as `gguf-q4_0`; None if there is none."""
    for name, grid in GGUF_GRIDS.items():
        if weights.grid == "integer" and all(
            getattr(weights, field) == value for field, value in grid.items()
        ):
            return name
    return None


def fill_in(quantization: dict[str, Any]) -> dict[str, Any]:
    """The recipe's `quantization` section with what its deployment dictates, where the recipe is silent."""
    grid = GGUF_GRIDS.get(quantization.get("deployment", "native"))
    if grid is None:
        return quantization
    # llama.cpp quantizes inputs by itself, in blocks of 32: nothing of that is simulated.
    return {"weights": dict(grid), "activations": None} | quantization


def check(deployment: str, weights: Scheme | None, activations: Scheme | None) -> None:
    """Refuse grids that a deployment format cannot store or run.

    Raises:
        ValueError: naming what would be right.
    """
    if deployment in GGUF_GRIDS:
        _check_gguf(deployment, weights, activations)
    elif deployment == "compressed-tensors":
        check_compressed_tensors(weights, activations)
    elif deployment == "torchao":
        check_torchao(weights, activations)


def check_compressed_tensors(weights: Scheme | None, activations: Scheme | None) -> None:
    """Refuse grids that no kernel of vLLM takes.

    Raises:
        ValueError: naming what would be right.
    """
    if weights is None:
        raise ValueError("weights in full precision with quantized inputs; quantize both or none")
    given = f"weights of {weights.describe()}"
    if weights.bits not in (4, 8) or weights.grid != "integer":
        raise ValueError(f"{given}; use an integer grid of 4 or 8 bits")
    if not weights.symmetric:
        # Stock transformers with compressed-tensors 0.20 reads zero points neither packed, as the format stores them
        # (the loader's empty model has unpacked ones: shapes differ), nor unpacked (it then unpacks them).
        raise ValueError(f"{given}; use a symmetric grid, or GGUF's Q4_1")
    if weights.granularity not in ("channel", "group") or (
        weights.group_size is not None and weights.group_size not in COMPRESSED_TENSORS_GROUPS
    ):
        sizes = ", ".join(map(str, COMPRESSED_TENSORS_GROUPS))
        raise ValueError(f"{given}; use granularity channel or groups of {sizes}")
    if activations is None:
        return
    if activations.bits != 8 or activations.granularity != "token" or not activations.symmetric:
        raise ValueError(f"inputs of {activations.describe()}; use int8 token, or none")
    if activations.range_method != "minmax":
        raise ValueError(f"inputs with range '{activations.range_method}'; runtimes take 'minmax'")
    if weights.bits == 8 and weights.granularity != "channel":
        raise ValueError(f"{given} with int8 inputs; use granularity channel")


def check_torchao(weights: Scheme | None, activations: Scheme | None) -> None:
    """Refuse grids that torchao's tensors do not describe.

    Raises:
        ValueError: naming what would be right.
    """
    if weights is None:
        raise ValueError("weights in full precision with quantized inputs; quantize both or none")
    given = f"weights of {weights.describe()}"
    if (
        weights.bits not in (4, 8)
        or weights.grid != "integer"
        or weights.granularity not in ("channel", "group")
    ):
        raise ValueError(f"{given}; use an integer grid of 4 or 8 bits, by channel or group")
    if activations is not None:
        raise ValueError(
            f"inputs of {activations.describe()}; torchao quantizes inputs of such weights asymmetrically, "
            "which is another grid: use none, or deployment 'compressed-tensors'"
        )


def check_some_gguf(weights: Scheme | None, activations: Scheme | None) -> None:
    """Refuse grids that no GGUF type stores exactly.

    Raises:
        ValueError: naming what would be right.
    """
    if weights is None or activations is not None or gguf_type(weights) is None:
        given = "full precision" if weights is None else weights.describe()
        inputs = "" if activations is None else f" and inputs of {activations.describe()}"
        raise ValueError(
            f"weights of {given}{inputs}; set quantization.deployment to one of {', '.join(GGUF_GRIDS)}"
        )


def _check_gguf(deployment: str, weights: Scheme | None, activations: Scheme | None) -> None:
    if weights is None or gguf_type(weights) != deployment:
        grid = ", ".join(f"{key}: {str(value).lower()}" for key, value in GGUF_GRIDS[deployment].items())
        raise ValueError(
            f"deployment '{deployment}' needs weights: {{{grid}}}; leave weights out to get exactly that"
        )
    if activations is not None:
        raise ValueError(
            f"deployment '{deployment}': llama.cpp quantizes inputs by itself; set activations to null"
        )
