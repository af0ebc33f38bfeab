"""The layer that training simulates, in plain differentiable torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from qatapult.kernels.fake_quant.dynamic import fake_quantize_dynamic
from qatapult.kernels.fake_quant.op import fake_quantize
from qatapult.kernels.fake_quant.spec import Gradient
from qatapult.kernels.scheme import Scheme


def fake_quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    weight_scheme: Scheme,
    activation_scheme: Scheme | None,
    gradient: Gradient,
) -> Tensor:
    """`fake_quantize(x) · fake_quantize(W)ᵀ + bias` in the dtypes given (autocast applies)."""
    values = fake_quantize(weight, weight_scale, weight_zero_point, scheme=weight_scheme, gradient=gradient)
    inputs = x if activation_scheme is None else fake_quantize_dynamic(x, activation_scheme)
    return linear(inputs, values.to(x.dtype), None if bias is None else bias.to(x.dtype))
