"""GPTQ: round one column at a time and let the columns that follow make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, with the order of columns by falling Hessian diagonal (`act_order`) that the
authors added later, and scales that are fixed beforehand, so that a group's scale does not depend on when its
columns are visited ("static groups"). Scales start from the layer's own range method; each row's range is
then shrunk where that lowers the error after compensation.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatapult import kernels
from qatapult.kernels import Scheme
from qatapult.trainer.quantize.modules import QuantLinear
from qatapult.trainer.quantize.ptq.calibration import hessian_of, walk_blocks
from qatapult.trainer.quantize.ptq.folding import set_range
from qatapult.trainer.recipe import schema
from qatapult.trainer.recipe.errors import UserError

log = logging.getLogger(__name__)

# Columns whose error is applied to the rest of the matrix in one product.
_BLOCK = 128
_MAX_DAMPING_RAISES = 4
# Damping for each feature that stands against one token. A Hessian of 4096 tokens for 1536 features believes
# in correlations by chance: with this, the error on other text fell by a quarter (docs/methods.md), and with
# many tokens it is nothing.
_DAMPING_FOR_FEW_TOKENS = 0.1
# Share of a step that a kept weight stays away from the border between two codes.
_BORDER = 1e-3
# Factors on a row's range that are tried, and how many elements are computed at a time for it.
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)
_ELEMENTS = 2**25


def quantize(
    model: nn.Module, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Quantize the linears of all decoder blocks in place, first to last.

    Every layer sees the inputs that the quantized layers before it give, quantized activations included. A
    linear is quantized the moment the calibration text reaches it, so one forward pass through a block does
    all of it, and layers that share an input (q, k, v; gate, up) share one Hessian.

    Args:
        model: a prepared model; scales start from `weight_scale` of its layers, and zero points stay.
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
            damping = self.damping + _DAMPING_FOR_FEW_TOKENS * seen.shape[-1] ** 2 / seen.numel()
            self._factor = Factor(hessian_of(seen), damping, self.act_order)
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
    """Quantize one layer in place with a factor that its inputs gave: its weight and its scales."""
    scheme = layer.weight_scheme
    assert scheme is not None
    if layer.scale_source == "recomputed":
        raise UserError("ptq: gptq needs scales that stay, and qat.method recomputes them: use rtn, or lsq")
    scale, zero_point = layer.grid()
    scale = best_ranges(layer.weight, factor, scheme, scale, zero_point)
    result = gptq_weight(layer.weight, factor, scheme, scale, zero_point)
    layer.weight.copy_(result.weight)
    set_range(layer, scale, zero_point)


def best_ranges(
    weight: Tensor, factor: Factor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """Shrink the range of each row (of all of it, with one scale a tensor) where GPTQ's own error falls.

    Rows do not touch each other in GPTQ, so all factors are tried for all rows at once. The unchanged range
    is among them: no row gets worse on the calibration text.

    Args:
        weight, factor, scheme, scale, zero_point: as for `gptq_weight`.

    Returns:
        The scales, of the same shape.
    """
    if scheme.bits < 2:
        return scale
    together = max(1, _ELEMENTS // weight.numel())
    errors = torch.cat(
        [
            _errors_of(weight, factor, scheme, [scale * shrink for shrink in part], zero_point)
            for part in _parts(_SHRINKS, together)
        ]
    )
    if scheme.granularity == "tensor":
        errors = errors.sum(1, keepdim=True)
    chosen = torch.tensor(_SHRINKS, device=scale.device)[errors.argmin(0)]
    shrunk = scale * chosen.reshape(-1, *[1] * (scale.ndim - 1))
    return shrunk.to(getattr(torch, scheme.scale_dtype)).float()


def _parts(values: tuple[float, ...], size: int) -> list[tuple[float, ...]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _errors_of(
    weight: Tensor, factor: Factor, scheme: Scheme, scales: list[Tensor], zero_point: Tensor | None
) -> Tensor:
    """GPTQ's error of each row under each of several scales, `[scales, N]`."""
    rows, columns = weight.shape
    wide = torch.cat([_per_column(scale, rows, columns) for scale in scales], dim=1)
    zeros = None if zero_point is None else _per_column(zero_point, rows, columns).repeat(1, len(scales))
    _, _, errors = _compensated(weight.repeat(len(scales), 1), factor, scheme, wide, zeros)
    return errors.view(len(scales), rows)


class Rounded(NamedTuple):
    """A weight that GPTQ has rounded.

    Attributes:
        weight: compensated, before rounding, fp32 `[N, K]`; each value within the cell of its code.
        codes: int8 `[N, K]`.
        error: mean squared error of each row's output, with the damping's share, fp32 `[N]`.
    """

    weight: Tensor
    codes: Tensor
    error: Tensor


def gptq_weight(
    weight: Tensor, factor: Factor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None
) -> Rounded:
    """Choose the codes of one weight.

    Args:
        weight: `[N, K]`, any floating dtype; computed in fp32.
        factor: of the `[K, K]` Hessian of the layer's inputs.
        scheme: the weight's grid.
        scale: `scheme.scale_shape((N, K))`, fp32.
        zero_point: like `scale`, or None.
    """
    rows, columns = weight.shape
    scales = _per_column(scale, rows, columns)
    zeros = None if zero_point is None else _per_column(zero_point, rows, columns)
    rest, values, errors = _compensated(weight, factor, scheme, scales, zeros)
    reach = scales[factor.order] * (0.5 - _BORDER)
    kept = torch.maximum(torch.minimum(rest, values + reach), values - reach)
    kept = kept[torch.argsort(factor.order)].t().contiguous()
    return Rounded(kept, kernels.quantize(kept, scale, zero_point, scheme), errors)


def _compensated(
    weight: Tensor, factor: Factor, scheme: Scheme, scales: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The recursion itself.

    Args:
        weight: `[N, K]`.
        scales, zeros: of each element, `[K, N]`.

    Returns:
        What each column was when its turn came and what it was rounded to, both `[K, N]` in the factor's
        order, and the error of each row: the sum of the squared column errors is `d H dᵀ` of the whole change
        `d`.
    """
    rows, columns = weight.shape
    order, root = factor.order, factor.inverse_root
    # Transposed, a column of the weight is contiguous.
    rest = weight.float().t()[order].contiguous()
    scales = scales[order]
    zeros = None if zeros is None else zeros[order].round()
    lowest: Any = scheme.qmin if zeros is None else scheme.qmin - zeros
    highest: Any = scheme.qmax if zeros is None else scheme.qmax - zeros
    values, total = torch.empty_like(rest), torch.zeros(rows, device=rest.device)
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
        total += errors.square().sum(0)
    return rest, values, total


def _per_column(parameter: Tensor, rows: int, columns: int) -> Tensor:
    """Scales or zero points as `[K, N]`: one row for each column of the weight."""
    if parameter.numel() == 1:
        return parameter.reshape(1, 1).expand(columns, rows)
    return parameter.reshape(rows, -1).repeat_interleave(columns // parameter.shape[-1], dim=1).t()
