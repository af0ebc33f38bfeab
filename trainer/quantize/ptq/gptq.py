"""GPTQ: round one column at a time and let the columns that follow make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with the order of columns by falling Hessian diagonal (`act_order`) that the
authors added later, and scales that are fixed beforehand from the layer's own range method, so that a group's
scale does not depend on when its columns are visited ("static groups").
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from qatapult import kernels
from qatapult.kernels import Scheme
from qatapult.trainer.quantize.modules import QuantLinear
from qatapult.trainer.quantize.ptq.calibration import hessian_of, walk_blocks
from qatapult.trainer.recipe import schema
from qatapult.trainer.recipe.errors import UserError
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Columns whose error is applied to the rest of the matrix in one product.
_BLOCK = 128
_MAX_DAMPING_RAISES = 4
# Share of a step that a kept weight stays away from the border between two codes.
_BORDER = 1e-3


def quantize(
    model: nn.Module, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Quantize the linears of all decoder blocks in place, first to last.

    Every layer sees the inputs that the quantized layers before it give, quantized activations included. A
    linear is quantized the moment the calibration text reaches it, so one forward pass through a block does
    all of it, and layers that share an input (q, k, v; gate, up) share one Hessian.

    Args:
        model: a prepared model; `weight_scale` (and zero points) of its layers are used as they are.
        calibration: token ids `[n, block]`.
        settings: damping and order of the columns.
        quantization: not needed here; every method takes it.

    Afterwards each `weight` holds the compensated value before it was rounded, inside the cell of GPTQ's
    code: the model's fake-quantized forward is GPTQ's result, and training starts from weights that still
    know which of their neighbours is nearer.

    Raises:
        UserError: if a layer's scales are recomputed from its weight.
        ValueError: if activations are not finite.
    """
    shared = _SharedFactor(settings.damping, settings.act_order)

    def on_input(layer: nn.Module, inputs: Tensor) -> None:
        if isinstance(layer, QuantLinear) and layer.weight_scheme is not None:
            compensate(layer, shared.factor_of(layer, inputs))

    walk_blocks(model, calibration, on_input)


class _SharedFactor:
    """Hessian factor of the latest input, kept as long as the same tensor comes again."""

    def __init__(self, damping: float, act_order: bool) -> None:
        self.damping, self.act_order = damping, act_order
        self._inputs: Tensor | None = None
        self._scheme: Scheme | None = None
        self._factor: Factor | None = None

    def factor_of(self, layer: QuantLinear, inputs: Tensor) -> Factor:
        if self._factor is None or self._inputs is not inputs or self._scheme != layer.activation_scheme:
            self._inputs, self._scheme = inputs, layer.activation_scheme
            seen = inputs if self._scheme is None else kernels.fake_quantize_dynamic(inputs, self._scheme)
            self._factor = Factor(hessian_of(seen), self.damping, self.act_order)
        return self._factor


class Factor:
    """Order of the columns and the triangular factor of the inverse Hessian in that order.

    Attributes:
        order: `[K]`, the column visited at each step.
        inverse_root: fp32 `[K, K]`, upper triangular `U` with `Uᵀ U = H⁻¹`.

    Raises:
        ValueError: if the Hessian holds NaN or infinities, or stays singular with raised damping.
    """

    def __init__(self, hessian: Tensor, damping: float, act_order: bool) -> None:
        diagonal = hessian.diagonal()
        if not torch.isfinite(diagonal).all():
            raise ValueError("the calibration activations hold NaN or infinities, so GPTQ has no Hessian")
        self.order = (
            torch.argsort(diagonal, descending=True, stable=True)
            if act_order
            else torch.arange(len(diagonal), device=hessian.device)
        )
        self.inverse_root = _inverse_root(hessian[self.order][:, self.order], damping)


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular `U` with `Uᵀ U = (H + damping · mean(diag H))⁻¹`.

    With the order of rows and columns reversed, the lower Cholesky factor of H becomes an upper factor
    `H = M Mᵀ`; then `U = M⁻¹`, for half the work of inverting H and factoring the inverse.
    """
    diagonal = hessian.diagonal()
    # A feature that is always zero has no say: alone in its row and column it is rounded to nearest.
    level = torch.where(diagonal > 0, diagonal.mean() * damping, diagonal.mean().clamp(min=1e-30))
    for _ in range(_MAX_DAMPING_RAISES):
        lower, failed = torch.linalg.cholesky_ex((hessian + torch.diag(level)).flip(0, 1))
        if not failed:
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        level = level * 10
        log.warning("GPTQ: the Hessian is not positive definite; damping raised tenfold")
    raise ValueError(f"the Hessian stays singular with {10 ** (_MAX_DAMPING_RAISES - 1)} times the damping")


@torch.no_grad()
def compensate(layer: QuantLinear, factor: Factor) -> None:
    """Quantize one layer in place with a factor that its inputs gave."""
    scheme = layer.weight_scheme
    assert scheme is not None
    if layer.scale_source == "recomputed":
        raise UserError("ptq: gptq needs scales that stay, and qat.method recomputes them: use rtn, or lsq")
    kept, _ = gptq_weight(layer.weight, factor, scheme, *layer.grid())
    layer.weight.copy_(kept)


def gptq_weight(
    weight: Tensor, factor: Factor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose the codes of one weight.

    Args:
        weight: `[N, K]`, any floating dtype; computed in fp32.
        factor: of the `[K, K]` Hessian of the layer's inputs.
        scheme: the weight's grid.
        scale: `scheme.scale_shape((N, K))`, fp32.
        zero_point: like `scale`, or None.

    Returns:
        The compensated weight `[N, K]` in fp32, each value within the cell of its code, and the codes, int8.
    """
    rows, columns = weight.shape
    order, root = factor.order, factor.inverse_root
    # Transposed, a column of the weight is contiguous.
    rest = weight.float().t()[order].contiguous()
    scales = _per_column(scale, rows, columns)[order]
    zeros = None if zero_point is None else _per_column(zero_point, rows, columns)[order].round()
    lowest: Any = scheme.qmin if zeros is None else scheme.qmin - zeros
    highest: Any = scheme.qmax if zeros is None else scheme.qmax - zeros
    values = torch.empty_like(rest)
    diagonal = root.diagonal().tolist()
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, rows, dtype=rest.dtype, device=rest.device)
        for i in range(start, end):
            # `kernels.quantize` and `dequantize` of one column, without their checks 10 µs instead of 100.
            bounds = (lowest, highest) if zeros is None else (lowest[i], highest[i])
            level = (rest[i] / scales[i] - scheme.level_offset).clamp_(*bounds).round_()
            torch.mul(level + scheme.level_offset, scales[i], out=values[i])
            torch.div(rest[i] - values[i], diagonal[i], out=errors[i - start])
            rest[i + 1 : end].addr_(root[i, i + 1 : end], errors[i - start], alpha=-1)
        rest[end:].addmm_(root[start:end, end:].t(), errors, alpha=-1)
    reach = scales * (0.5 - _BORDER)
    kept = torch.maximum(torch.minimum(rest, values + reach), values - reach)
    kept = kept[torch.argsort(order)].t().contiguous()
    return kept, kernels.quantize(kept, scale, zero_point, scheme)


def _per_column(parameter: Tensor, rows: int, columns: int) -> Tensor:
    """Scales or zero points as `[K, N]`: one row for each column of the weight."""
    if parameter.numel() == 1:
        return parameter.reshape(1, 1).expand(columns, rows)
    return parameter.reshape(rows, -1).repeat_interleave(columns // parameter.shape[-1], dim=1).t()
