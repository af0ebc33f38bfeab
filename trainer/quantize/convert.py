"""`convert`: from a trained model to packed integers, the model that is served."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from qatapult.kernels import PreparedWeight, Scheme, pack, packed_linear, prepare_weight
from qatapult.trainer.quantize.modules import QuantizedWeight, QuantLinear
from qatapult.trainer.quantize.prepare import quant_layers

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer of packed codes, multiplied as integers where its inputs are quantized.

    Attributes:
        packed: uint8 `[N, ceil(K · bits / 8)]`.
        weight_scale: fp32, `weight_scheme.scale_shape((N, K))`.
        weight_zero_point: fp32 integers of the same shape, or None.
        bias: `[N]` or None.
        activation_clip: fp32 `[1]`, bound of the inputs' magnitude (PACT), or None.
        calls: forward passes since it was made; the evaluation reports which kernels really ran.
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    activation_clip: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        bias: Tensor | None,
        weight_scheme: Scheme,
        activation_scheme: Scheme | None,
        activation_clip: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.weight_scheme = weight_scheme
        self.activation_scheme = activation_scheme
        self.register_buffer("packed", pack(codes, weight_scheme))
        self.register_buffer("weight_scale", weight_scale.detach().clone())
        zero_point = None if weight_zero_point is None else weight_zero_point.detach().round()
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer(
            "activation_clip", None if activation_clip is None else activation_clip.detach().clone()
        )
        self.calls = 0
        self._prepared: PreparedWeight | None = None

    @classmethod
    def from_quantized(cls, layer: QuantLinear) -> PackedLinear:
        """Pack a trained layer: the same codes and scales that its last forward used."""
        assert layer.weight_scheme is not None
        scale, zero_point = layer.grid()
        return cls(
            layer.codes(),
            scale,
            zero_point,
            layer.bias,
            layer.weight_scheme,
            layer.activation_scheme,
            layer.activation_clip,
        )

    @property
    def kind(self) -> str:
        """Name of the arithmetic: `int4 × int8` is a product of integers, `int4 × float` is not."""
        activations = f"int{self.activation_scheme.bits:g}" if self.activation_scheme else "float"
        return f"{self.weight_scheme.describe().split()[0]} × {activations}"

    @property
    def nbytes(self) -> int:
        """Bytes of the layer as it is stored."""
        tensors = (self.packed, self.weight_scale, self.weight_zero_point, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def prepared(self) -> PreparedWeight:
        """The codes in the order the device multiplies fastest, made at the first call."""
        if self._prepared is None or self._prepared.operand.device != self.packed.device:
            self._prepared = prepare_weight(
                self.packed,
                self.weight_scale,
                self.weight_zero_point,
                scheme=self.weight_scheme,
                features=self.in_features,
                activation_scheme=self.activation_scheme,
            )
        return self._prepared

    def forget_prepared(self) -> None:
        """Free what `prepared` made; it is made again when it is next needed."""
        self._prepared = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Multiply x `[..., K]`; `[..., N]` in x's dtype."""
        self.calls += 1
        if self.activation_clip is not None:
            x = x.clamp(-self.activation_clip, self.activation_clip)
        return packed_linear(
            x, self.prepared(), bias=self.bias, activation_scheme=self.activation_scheme, out_dtype=x.dtype
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


@torch.no_grad()
def convert(model: AnyModule, in_place: bool = False) -> AnyModule:
    """Replace the quantized linears of a prepared model by packed ones.

    Embeddings, convolutions and linears with full-precision weights are replaced by ordinary layers that hold the
    values of their grid.

    Args:
        model: a model that went through `prepare`.
        in_place: change the model itself instead of a copy.

    Returns:
        The packed model, in evaluation mode.
    """
    packed = model if in_place else copy.deepcopy(model)
    for name, layer in quant_layers(packed).items():
        if isinstance(layer, QuantLinear) and layer.weight_scheme is not None:
            parent, _, child = name.rpartition(".")
            setattr(packed.get_submodule(parent), child, PackedLinear.from_quantized(layer))
        else:
            _restore(layer)
    return packed.eval()


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a converted model, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _restore(layer: QuantizedWeight) -> None:
    """Back to the ordinary class, with the values of the grid as its weights."""
    if layer.weight_scheme is not None:
        layer.weight.copy_(layer.fake_quantized_weight())
        layer.weight_scheme = None
    if layer.activation_scheme is None:
        layer.__class__ = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn"))
