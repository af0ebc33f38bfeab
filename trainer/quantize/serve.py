"""`serve`: a model of LLaMA's kind in the arithmetic that serves it on a CPU.

Norms, gates and attention run in single compiled passes, and a layer whose linears are all packed integers runs as two
calls around its attention. Names of parameters and the modules' interfaces stay: classes are swapped in place. The
functions are those of transformers up to rounding; since int8 codes depend on every rounding, models that are compared
bit for bit (parity) must both be served.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from qatapult.kernels import FusedLayer, LayerShape, LinearParts, attention, rms_norm, silu_product
from qatapult.trainer.quantize.convert import PackedLinear

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)

_ATTENTION = "qatapult"
_STOCK = "sdpa"


def serve(model: AnyModel) -> AnyModel:
    """Swap a model's layers for those that serve it, in place; other models than LLaMA's stay as they are.

    Args:
        model: full-precision, prepared or packed, in evaluation mode. Where gradients are recorded the modules of
            transformers run.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    for module in model.modules():
        served = _SERVED.get(type(module))
        if served is not None:
            module.__class__ = served
    implementation = model.config._attn_implementation
    if implementation == _STOCK and any(isinstance(m, ServedLayer) for m in model.modules()):
        model.config._attn_implementation = _ATTENTION
    return model


def cast(model: AnyModel, dtype: torch.dtype) -> AnyModel:
    """Parameters in another dtype, in place; scales and the other buffers of packed layers stay in theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


class ServedNorm(LlamaRMSNorm):
    """`LlamaRMSNorm` in one pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norm of `[..., D]`."""
        if torch.is_grad_enabled() or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ServedMLP(LlamaMLP):
    """`LlamaMLP` with silu and product in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        if torch.is_grad_enabled() or self.config.hidden_act != "silu":
            return super().forward(x)
        return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))


class ServedLayer(LlamaDecoderLayer):
    """`LlamaDecoderLayer` as two calls around its attention, where all its linears are packed integers."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`; arguments as in transformers."""
        compiled = None if position_embeddings is None else self._compiled_for(hidden_states)
        if compiled is None:
            more = {"use_cache": use_cache, "position_embeddings": position_embeddings, **kwargs}
            return super().forward(hidden_states, attention_mask, position_ids, past_key_values, **more)
        assert position_embeddings is not None
        block: Any = self.self_attn
        hidden_states = hidden_states.contiguous()
        cos, sin = (part.expand(*hidden_states.shape[:2], -1).contiguous() for part in position_embeddings)
        query, key, value = compiled.project(hidden_states, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, block.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[block.config._attn_implementation]
        attended, _ = attend(block, query, key, value, attention_mask, dropout=0.0, scaling=block.scaling)
        for layer in self._linears():
            layer.calls += 1
        return compiled.finish(hidden_states, attended.contiguous())

    def _linears(self) -> list[Any]:
        block, mlp = self.self_attn, self.mlp
        return [
            *(block.q_proj, block.k_proj, block.v_proj, block.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        ]

    def _compiled_for(self, x: Tensor) -> FusedLayer | None:
        """The compiled layer, made at the first call; None where it does not take this layer or input."""
        norm = self.input_layernorm.weight
        if torch.is_grad_enabled() or x.dtype != norm.dtype or x.device.type != "cpu":
            return None
        made_of, compiled = self.__dict__.get("_fused", (None, None))
        # A model whose weights moved to another dtype has other norms.
        if made_of != norm.data_ptr():
            compiled = self._compile()
            self.__dict__["_fused"] = (norm.data_ptr(), compiled)
        return compiled

    def _compile(self) -> FusedLayer | None:
        linears, config = self._linears(), self.self_attn.config
        if config.hidden_act != "silu" or not all(_is_integer(layer) for layer in linears):
            return None
        parts = [LinearParts(layer.prepared(), layer.bias, layer.activation_scheme) for layer in linears]
        norms = (self.input_layernorm, self.post_attention_layernorm)
        shape = LayerShape(
            self.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            self.self_attn.head_dim,
            config.intermediate_size,
        )
        weights = [norm.weight.detach() for norm in norms]
        if not FusedLayer.fits(parts, weights, shape):
            return None
        pairs = [(weight, norm.variance_epsilon) for weight, norm in zip(weights, norms, strict=True)]
        compiled = FusedLayer(parts[:3], parts[3], parts[4:6], parts[6], (pairs[0], pairs[1]), shape)
        for layer in (*linears[:3], *linears[4:6]):
            layer.forget_prepared()  # they are held joined now
        return compiled


def _is_integer(layer: nn.Module) -> bool:
    return (
        isinstance(layer, PackedLinear)
        and layer.activation_scheme is not None
        and layer.activation_clip is None
    )


def _served_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compiled attention where no mask is needed but the causal one; else that of transformers."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None or torch.is_grad_enabled() or queries not in (1, keys) or query.device.type != "cpu":
        return ALL_ATTENTION_FUNCTIONS[_STOCK](module, query, key, value, mask, scaling=scaling, **more)
    return attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(_ATTENTION, _served_attention)
AttentionMaskInterface.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[_STOCK])

_SERVED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: ServedLayer,
    LlamaMLP: ServedMLP,
    LlamaRMSNorm: ServedNorm,
}
