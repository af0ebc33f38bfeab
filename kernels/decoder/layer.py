"""A decoder layer on packed weights as two compiled calls around its attention: `layer.cpp`.

At a token a call most of the time of a small model goes into calling its modules and operators. Inside of a call
norm, quantization, products, rotary embedding, gate and residual follow each other in C++; query, key and value are
one product, gate and up are one, each on inputs that are quantized once. The bits are those of `ops.py` and
`packed_linear`, called one by one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qatapult.kernels.common.backend import backend_for
from qatapult.kernels.common.launches import record
from qatapult.kernels.decoder.ops import DTYPES, layer_library
from qatapult.kernels.int_gemm import vnni
from qatapult.kernels.int_gemm.weights import PreparedWeight
from qatapult.kernels.scheme import Scheme

# Rows of a weight come in pairs of tiles; weights are joined where pairs end.
_PAIR = 32


@dataclass(frozen=True)
class LinearParts:
    """A linear layer of the decoder.

    Attributes:
        weight: prepared for quantized activations.
        bias: [N] or None.
        tokens: scheme of the activations.
    """

    weight: PreparedWeight
    bias: Tensor | None
    tokens: Scheme


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer: hidden, heads, heads of keys, size of a head, intermediate."""

    hidden: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("linear", "qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "head_size", "intermediate")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps")),
    )


class FusedLayer:
    """A decoder layer whose linears are all packed integers.

    Args:
        qkv: its linear of query, key and value, joined; they share the scheme of their input.
        out: its linear after attention.
        gate_up: its linear of gate and up, joined likewise.
        down: its linear after the gate.
        norms: weights of the norms before attention and before the gate, fp32 or bf16 [hidden], and their eps.
        shape: its sizes.
    """

    def __init__(
        self,
        qkv: list[LinearParts],
        out: LinearParts,
        gate_up: list[LinearParts],
        down: LinearParts,
        norms: tuple[tuple[Tensor, float], tuple[Tensor, float]],
        shape: LayerShape,
    ) -> None:
        library = layer_library()
        assert library is not None
        self._library, self.shape = library, shape
        (first, first_eps), (second, second_eps) = norms
        self.dtype = first.dtype
        self._held = [_joined(qkv), out, _joined(gate_up), down]
        self._weights = [_native(part) for part in self._held]
        self._norms = (first.contiguous(), second.contiguous())
        addresses = [ctypes.addressof(weight) for weight, _ in self._weights]
        sizes = (shape.hidden, shape.heads, shape.key_heads, shape.head_size, shape.intermediate)
        norm_addresses = [norm.data_ptr() for norm in self._norms]
        self._layer = _Layer(
            vnni.linear_address(), *addresses, *norm_addresses, *sizes, first_eps, second_eps
        )

    @staticmethod
    def fits(parts: list[LinearParts], norms: list[Tensor], shape: LayerShape) -> bool:
        """Whether the compiled layer takes these sizes, norms of this dtype, and these seven linears.

        Args:
            parts: of query, key, value, output, gate, up and down.
            norms: weights of both norms.
            shape: sizes.
        """
        library, dtype = layer_library(), norms[0].dtype
        if library is None or not vnni.available() or backend_for(norms[0]) != "cpu":
            return False
        lanes = library.qatapult_lanes()
        sizes = (shape.hidden, shape.intermediate, shape.head_size // 2)
        if any(size % lanes for size in sizes) or any(norm.dtype != dtype for norm in norms):
            return False
        alike = all(_joinable(group) for group in (parts[:3], parts[4:6]))
        return dtype in DTYPES and alike and all(_fits(part, dtype) for part in parts)

    def __deepcopy__(self, memo: object) -> FusedLayer:
        return self  # nothing in it ever changes

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, products with the weights of query, key and value, and the rotary embedding.

        Args:
            x: [B, S, hidden], contiguous, of the norms' dtype.
            cos: [B, S, head size], contiguous, of the same dtype.
            sin: as cos.

        Returns:
            Query [B, heads, S, head size], key and value [B, key heads, S, head size].
        """
        (batch, tokens, _), shape = x.shape, self.shape
        query = x.new_empty(batch, shape.heads, tokens, shape.head_size)
        key = x.new_empty(batch, shape.key_heads, tokens, shape.head_size)
        value = torch.empty_like(key)
        inputs = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), batch, tokens)
        outputs = (query.data_ptr(), key.data_ptr(), value.data_ptr(), torch.get_num_threads())
        self._library.qatapult_layer_project(self._reference, DTYPES[x.dtype], *inputs, *outputs)
        record("integer", 3)
        return query, key, value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: x [B, S, hidden] and the attention's result, [B, S, heads · head size]."""
        y, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
        pointers = (x.data_ptr(), attended.data_ptr(), y.data_ptr())
        threads = torch.get_num_threads()
        self._library.qatapult_layer_finish(self._reference, DTYPES[x.dtype], *pointers, rows, threads)
        record("integer", 4)
        return y

    @property
    def _reference(self) -> object:
        return ctypes.byref(self._layer)


def _fits(part: LinearParts, dtype: torch.dtype) -> bool:
    return part.weight.layout == "vnni" and vnni.quantizes(part.tokens, dtype)


def _joinable(parts: list[LinearParts]) -> bool:
    """Whether linears have the same grids, and rows that end where pairs of tiles do."""
    kinds = {(part.weight.scheme, part.weight.features, part.tokens) for part in parts}
    return len(kinds) == 1 and all(part.weight.out_features % _PAIR == 0 for part in parts)


def _joined(parts: list[LinearParts]) -> LinearParts:
    """Linears of one input as one, with the rows of all."""
    weights, first = [part.weight for part in parts], parts[0]
    shifts = [weight.shift for weight in weights if weight.shift is not None]
    weight = PreparedWeight(
        operand=torch.cat([weight.operand for weight in weights]),
        scale=_by_group([weight.scale for weight in weights]),
        shift=_by_group(shifts) if shifts else None,
        scheme=first.weight.scheme,
        layout="vnni",
        features=first.weight.features,
    )
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat(
            [
                torch.zeros(part.weight.out_features) if part.bias is None else part.bias.float()
                for part in parts
            ]
        )
    return LinearParts(weight, bias, first.tokens)


def _by_group(tables: list[Tensor]) -> Tensor:
    return torch.cat(tables).t().contiguous().t()


def _native(part: LinearParts) -> tuple[vnni.Weight, Tensor | None]:
    weight = part.weight
    return vnni.native(weight.operand, weight.scale, weight.shift, part.bias, weight.features, part.tokens)
