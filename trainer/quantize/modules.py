"""Layers under quantization-aware training: ordinary layers whose weights and inputs pass through a grid.

Each keeps its `weight` under its own name and holds learned scales beside it, so that checkpoints, ZeRO-3, FSDP2
and the Hugging Face loaders see an ordinary layer with a few more parameters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qatapult.kernels import (
    Scheme,
    choose_range,
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    quantized_linear,
)

#: Where scales come from: `learned` (LSQ), `learned_with_zero_point` (LSQ+), or `recomputed` from the weights.
ScaleSource = Literal["learned", "learned_with_zero_point", "recomputed"]

# Scales move little; a floor keeps a collapsing one from dividing by zero before the guard sees it.
_SMALLEST_SCALE = 1e-8


class QuantizedWeight(nn.Module):
    """What the quantized layers share: a weight on a grid, and the state that schedules switch.

    Attributes:
        weight: full-precision weight, `[N, K]` (convolutions: `[N, C, kH, kW]`, on the grid as `[N, C·kH·kW]`).
        weight_scale: fp32, `weight_scheme.scale_shape`; a parameter where it is learned, else a buffer.
        weight_zero_point: fp32 integers of the same shape, or None on a symmetric grid.
        activation_clip: fp32 `[1]`, learned bound of the inputs' magnitude (PACT), or None.
        weight_scheme: the weight's grid, or None to leave it in full precision.
        activation_scheme: the input's grid, or None.
        scale_source: see `ScaleSource`.
        quantize_weights: set to False before the weights' start in a delayed schedule.
        quantize_activations: likewise for the inputs.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    activation_clip: nn.Parameter | None

    def configure(
        self,
        weight_scheme: Scheme | None,
        activation_scheme: Scheme | None,
        scale_source: ScaleSource,
        learned_clip: bool = False,
    ) -> None:
        """Lay the current weight on a grid: scales are chosen from it by the scheme's range method."""
        self.weight_scheme = weight_scheme
        self.activation_scheme = activation_scheme
        self.scale_source: ScaleSource = scale_source
        self.quantize_weights = True
        self.quantize_activations = True
        self.integer_forward: Literal["auto", "integer", "fake"] = "auto"
        for name in ("weight_scale", "weight_zero_point", "activation_clip"):
            self.__dict__.pop(name, None)
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        if weight_scheme is None:
            self.weight_scale = self.weight_zero_point = None
        else:
            self._register_scales(*choose_range(self.weight_matrix(), weight_scheme))
        # Infinite until `calibrate_clips` has seen activations: it then clips nothing.
        infinite = torch.full((1,), float("inf"), device=self.weight.device)
        self.activation_clip = nn.Parameter(infinite) if learned_clip else None

    def _register_scales(self, scale: Tensor, zero_point: Tensor | None) -> None:
        if self.scale_source == "recomputed":
            self.register_buffer("weight_scale", scale)
        else:
            self.weight_scale = nn.Parameter(scale)
        if zero_point is None:
            self.weight_zero_point = None
        elif self.scale_source == "learned_with_zero_point":
            self.weight_zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("weight_zero_point", zero_point)

    def weight_matrix(self) -> Tensor:
        """The weight as `[N, K]`, with the adapter that trains in its stead added, if it has one."""
        up = getattr(self, "lora_up", None)
        return self.weight.flatten(1) if up is None else self.weight.flatten(1) + up @ self.lora_down

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point in force: fp32, rounded to the scheme's `scale_dtype`."""
        assert self.weight_scheme is not None
        if self.scale_source == "recomputed":
            return choose_range(self.weight_matrix(), self.weight_scheme)
        assert self.weight_scale is not None
        scale = self.weight_scale.clamp(min=_SMALLEST_SCALE)
        if self.weight_scheme.scale_dtype != "float32":
            # Straight through: the rounding to the stored dtype must not stop the gradient.
            scale = (
                scale + (scale.to(getattr(torch, self.weight_scheme.scale_dtype)).float() - scale).detach()
            )
        return scale, self.weight_zero_point

    def fake_quantized_weight(self) -> Tensor:
        """The weight as the grid represents it, differentiable; the full-precision one where not quantized."""
        if self.weight_scheme is None:
            return self.weight_matrix().view_as(self.weight)
        if not self.quantize_weights:
            waiting = _waiting(self.weight_scale, self.weight_zero_point)
            return with_zero(self.weight_matrix(), waiting).view_as(self.weight)
        scale, zero_point = self.grid()
        gradient: Literal["lsq", "ste"] = "ste" if self.scale_source == "recomputed" else "lsq"
        matrix = fake_quantize(
            self.weight_matrix(), scale, zero_point, scheme=self.weight_scheme, gradient=gradient
        )
        return matrix.view_as(self.weight)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes of the weight, int8 `[N, K]`."""
        assert self.weight_scheme is not None
        return quantize(self.weight_matrix(), *self.grid(), self.weight_scheme)

    def clipped_input(self, x: Tensor) -> Tensor:
        """The input within the learned clip, if there is one (PACT, arXiv:1805.06085, on both sides).

        The clip's gradient is that of the elements beyond it; the range is then chosen among what is left.
        """
        if self.activation_clip is None:
            return x
        if not self.quantize_activations:
            return with_zero(x, _waiting(self.activation_clip))
        clip = self.activation_clip.to(x.dtype)
        return torch.minimum(torch.maximum(x, -clip), clip)

    def fake_quantized_input(self, x: Tensor) -> Tensor:
        """The layer's input as its grid represents it."""
        if self.activation_scheme is None or not self.quantize_activations:
            return self.clipped_input(x)
        return fake_quantize_dynamic(self.clipped_input(x), self.activation_scheme)


def _waiting(*parameters: Tensor | None) -> list[nn.Parameter]:
    """Those that learn, and that a schedule leaves out for now."""
    learned = (p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad)
    return list(learned) if torch.is_grad_enabled() else []


def with_zero(x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """`x`, with a zero gradient for parameters that it does not depend on: DDP waits for every one's."""
    for parameter in parameters:
        x = x + (0 * parameter.sum()).nan_to_num().to(x.dtype)
    return x


class QuantLinear(QuantizedWeight, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x `[..., K]` with the quantized weight; `[..., N]` in x's (or autocast's) dtype."""
        activation_scheme = self.activation_scheme if self.quantize_activations else None
        if self.weight_scheme is None or not self.quantize_weights:
            return nn.functional.linear(self.fake_quantized_input(x), self.fake_quantized_weight(), self.bias)
        scale, zero_point = self.grid()
        return quantized_linear(
            self.clipped_input(x),
            self.weight_matrix(),
            scale,
            zero_point,
            self.bias,
            weight_scheme=self.weight_scheme,
            activation_scheme=activation_scheme,
            gradient="ste" if self.scale_source == "recomputed" else "lsq",
            mode=self.integer_forward,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


class QuantEmbedding(QuantizedWeight, nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding` on a grid. Only the rows that are looked up are quantized."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids, int64 `[...]`; `[..., K]`."""
        if self.weight_scheme is None:
            return super().forward(ids)
        if not self.quantize_weights:
            return with_zero(super().forward(ids), _waiting(self.weight_scale, self.weight_zero_point))
        scale, zero_point = self.grid()
        rows = nn.functional.embedding(ids, self.weight, self.padding_idx)
        if self.weight_scheme.granularity != "tensor":
            scale = nn.functional.embedding(ids, scale)
            zero_point = None if zero_point is None else nn.functional.embedding(ids, zero_point)
        gradient: Literal["lsq", "ste"] = "ste" if self.scale_source == "recomputed" else "lsq"
        return fake_quantize(rows, scale, zero_point, scheme=self.weight_scheme, gradient=gradient)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


class QuantConv2d(QuantizedWeight, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` on a grid; its weight is quantized as `[N, C·kH·kW]`, its input per image."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x `[B, C, H, W]`."""
        if self.activation_scheme is not None and self.quantize_activations:
            x = self.fake_quantized_input(x.flatten(1)).view_as(x)
        return self._conv_forward(x, self.fake_quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


def describe(layer: QuantizedWeight) -> str:
    """`W int4 g64, A int8 token`."""
    weights = layer.weight_scheme.describe() if layer.weight_scheme else "full precision"
    activations = layer.activation_scheme.describe() if layer.activation_scheme else "full precision"
    return f"W {weights}, A {activations}"
