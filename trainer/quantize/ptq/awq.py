"""AWQ: scale up the input channels that matter, so that rounding hurts them less, then clip the ranges.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv:2306.00978, section 3.2: the factor of channel j is `mean|X_j|^α`, with the α of a grid that gives the
least error of the outputs, and the layer before is divided by it; then the range of each row of weights is
shrunk where that lowers the error further. Errors of outputs are computed from the inputs' second moments
`H` as `trace((W − Ŵ) H (W − Ŵ)ᵀ)`: the mean squared error over all tokens, without keeping them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatapult.kernels import Scheme, choose_range, dequantize
from qatapult.kernels import quantize as quantize_codes
from qatapult.trainer.quantize.modules import QuantizedWeight, QuantLinear
from qatapult.trainer.quantize.ptq.calibration import full_precision, hessian_of, walk_blocks
from qatapult.trainer.quantize.ptq.folding import Fold, folds_of, set_range
from qatapult.trainer.recipe import schema

_EXPONENTS = tuple(step / 10 for step in range(11))
_SHRINKS = tuple(1 - step * 0.05 for step in range(11))
# Loudest against quietest channel: beyond it the factors say more about noise than about importance.
_SMALLEST = 1e-4


def quantize(
    model: nn.Module, calibration: Tensor, settings: schema.Ptq, quantization: schema.Quantization
) -> None:
    """Scale and clip all decoder blocks of a prepared model in place.

    Args:
        model: a prepared model with LLaMA-class blocks, its scales fixed or learned.
        calibration: token ids `[n, block]`; the statistics are those of the full-precision model.
        settings: not needed here; every method takes it.
        quantization: not needed here; every method takes it.

    Raises:
        UserError: for a block of another structure.
    """
    moments = _Moments()

    def after_block(block: nn.Module) -> None:
        for fold in folds_of(block):
            hessian, mean = moments.of(fold.consumers[0])
            factor = best_factor(fold, hessian, mean)
            fold.apply(factor)
            for consumer in fold.consumers:
                # The producer's outputs shrank by the factor, and so did the consumers' inputs.
                moments.divide(consumer, factor)
        for layer in block.modules():
            if isinstance(layer, QuantLinear) and layer.weight_scheme is not None:
                set_range(layer, *clipped_range(layer.weight, moments.of(layer)[0], layer.weight_scheme))
        moments.clear()

    with full_precision(model):
        walk_blocks(model, calibration, moments.see, after_block)


class _Moments:
    """Second moments and mean magnitudes of each linear's inputs; layers with the same input share them."""

    def __init__(self) -> None:
        self._of: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._latest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def see(self, layer: nn.Module, inputs: Tensor) -> None:
        if self._latest is None or self._latest[0] is not inputs:
            mean = inputs.flatten(0, -2).abs().mean(0).float()
            self._latest = (inputs, (hessian_of(inputs), mean))
        self._of[layer] = self._latest[1]

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return self._of[layer]

    def divide(self, layer: nn.Module, factor: Tensor) -> None:
        hessian, mean = self._of[layer]
        self._of[layer] = (hessian / torch.outer(factor, factor), mean / factor)

    def clear(self) -> None:
        self._of.clear()
        self._latest = None


@torch.no_grad()
def best_factor(fold: Fold, hessian: Tensor, mean: Tensor) -> Tensor:
    """The factor of a fold with the least output error of its consumers, by a search over the exponent.

    Args:
        fold: the place.
        hessian: second moments of the consumers' inputs, fp32 `[K, K]`.
        mean: mean magnitudes of the inputs, fp32 `[K]`.

    Returns:
        fp32 `[K]`, with a geometric mean of its extremes of 1.
    """
    importance = fold.shared(mean)
    importance = (importance / importance.max().clamp(min=1e-30)).clamp(min=_SMALLEST)
    best, least = torch.ones_like(importance), float("inf")
    for exponent in _EXPONENTS:
        factor = importance**exponent
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = sum(_scaled_error(consumer, factor, hessian) for consumer in fold.consumers)
        if error < least:
            best, least = factor, float(error)
    return best


def _scaled_error(layer: nn.Linear, factor: Tensor, hessian: Tensor) -> float:
    if not isinstance(layer, QuantizedWeight) or layer.weight_scheme is None:
        return 0.0
    weight = layer.weight.float()
    scaled = weight * factor
    scale, zero_point = choose_range(scaled, layer.weight_scheme)
    rounded = _rounded(scaled, scale, zero_point, layer.weight_scheme)
    return float(_errors(weight - rounded / factor, hessian).sum())


@torch.no_grad()
def clipped_range(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points, shrunk row by row where that lowers the error of the outputs.

    All groups of a row shrink alike: their errors do not add up, because inputs are correlated.

    Args:
        weight: `[N, K]`.
        hessian: second moments of its inputs, fp32 `[K, K]`.
        scheme: the weight's grid.
    """
    weight = weight.float()
    scale, zero_point = choose_range(weight, scheme)
    if scheme.granularity == "tensor" or scheme.bits < 2:
        return scale, zero_point
    best = torch.ones(len(weight), 1, device=weight.device)
    least = torch.full((len(weight),), float("inf"), device=weight.device)
    for shrink in _SHRINKS:
        error = _errors(weight - _rounded(weight, scale * shrink, zero_point, scheme), hessian)
        best[error < least] = shrink
        least = torch.minimum(least, error)
    stored: torch.dtype = getattr(torch, scheme.scale_dtype)
    return (scale * best).to(stored).float(), zero_point


def _errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared output error of each row, `[N]`."""
    return ((difference @ hessian) * difference).sum(1)


def _rounded(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    return dequantize(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme)
