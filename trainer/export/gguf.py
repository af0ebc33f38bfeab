"""GGUF, for llama.cpp: blocks of 32 codes that share an fp16 scale (Q4_0, Q8_0), and an fp16 minimum (Q4_1).

The block layouts are ggml's (ggml-common.h: `block_q4_0`, `block_q4_1`, `block_q8_0`). Codes are stored as
they were trained. Embeddings and skipped linears keep the checkpoint's dtype, norms are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qatapult.trainer.export.folder import appearing, source_dtype
from qatapult.trainer.export.gguf_tokenizer import write_tokenizer
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.quantize.modules import QuantizedWeight, QuantLinear
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.deployment import GGUF_GRIDS, gguf_type
from qatapult.trainer.recipe.errors import UserError

FILE = "model.gguf"
_BLOCK = 32
_ARCHITECTURES = ("llama", "mistral")
_TYPES = {
    "gguf-q4_0": GGMLQuantizationType.Q4_0,
    "gguf-q4_1": GGMLQuantizationType.Q4_1,
    "gguf-q8_0": GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_FLOATS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def export(model: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `model.gguf`.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        folder: replaced if it exists.

    Raises:
        UserError: for a grid, a model or a tokenizer that GGUF has no form for; nothing is written then.
    """
    types = _check(model)
    with appearing(folder) as building:
        writer = GGUFWriter(building / FILE, "llama")
        _write_config(writer, model.config, types)
        write_tokenizer(writer, tokenizer, model.config.vocab_size)
        names = _names(model)
        stored = [(names[name], kind, shape) for name, kind, shape in _plan(model, types)]
        for name, kind, shape in stored:
            width, size = _bytes_of(kind)
            row = shape[-1] // width * size
            writer.add_tensor_info(
                name, (*shape[:-1], row), np.dtype(np.uint8), int(np.prod(shape[:-1])) * row, kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, layer in model.layers():
            for key, tensor in _tensors(layer):
                full = f"{name}.{key}"
                writer.write_tensor_data(_encode(model, full, layer, key, tensor, types))
        writer.close()


def reload(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the file with llama.cpp (xllamacpp); token losses of ids, `[B, S]` to `[B, S − 1]`.

    Raises:
        UserError: if xllamacpp is not installed.
    """
    from qatapult.trainer.export.llama_cpp import LlamaCpp

    return LlamaCpp(folder / FILE).token_losses


def _check(model: TrainedModel) -> dict[str, GGMLQuantizationType]:
    """The type of every quantized linear, by name."""
    if model.config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"export gguf: models of type {model.config.model_type!r} are not supported; {_ARCHITECTURES} are"
        )
    rope = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise UserError(f"export gguf: rotary embeddings of type {rope!r} are not supported; 'default' is")
    types = {}
    for name, layer in quant_layers(model.skeleton).items():
        if not isinstance(layer, QuantLinear):
            continue
        kind = gguf_type(layer.weight_scheme) if layer.weight_scheme else None
        if kind is None or layer.activation_scheme is not None:
            given = layer.weight_scheme.describe() if layer.weight_scheme else "full precision"
            inputs = f" and inputs of {layer.activation_scheme.describe()}" if layer.activation_scheme else ""
            raise UserError(
                f"export gguf: layer {name} has weights of {given}{inputs}, which GGUF has no form for; "
                f"train with quantization.deployment set to {', '.join(GGUF_GRIDS)}"
            )
        types[name] = _TYPES[kind]
    return types


def _write_config(writer: GGUFWriter, config: Any, types: dict[str, GGMLQuantizationType]) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(str(config._name_or_path or "qatapult"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)
    most = max(set(types.values()), key=list(types.values()).count)
    writer.add_file_type(_FILE_TYPES[most])


def _names(model: TrainedModel) -> dict[str, str]:
    """GGUF names of the parameters."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    result = {}
    for name, _ in model.skeleton.named_parameters(remove_duplicate=False):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is not None:
            result[name] = mapped
    return result


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Weight and bias; scales are part of the weight's blocks."""
    return [
        (key, tensor) for key, tensor in layer.named_parameters(recurse=False) if key in ("weight", "bias")
    ]


def _plan(
    model: TrainedModel, types: dict[str, GGMLQuantizationType]
) -> list[tuple[str, GGMLQuantizationType, tuple[int, ...]]]:
    """Name, type and shape of every tensor, in the order in which they are written."""
    plan = []
    for name, layer in model.structure():
        for key, tensor in _tensors(layer):
            kind = types.get(name) if key == "weight" else None
            plan.append((f"{name}.{key}", kind or _float_type(model, tensor), tuple(tensor.shape)))
    return plan


def _float_type(model: TrainedModel, tensor: Tensor) -> GGMLQuantizationType:
    return GGMLQuantizationType.F32 if tensor.ndim == 1 else _FLOATS[source_dtype(model)]


def _bytes_of(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Elements and bytes of the smallest unit of a type."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[kind]


def _encode(
    model: TrainedModel,
    full_name: str,
    layer: nn.Module,
    key: str,
    tensor: Tensor,
    types: dict[str, GGMLQuantizationType],
) -> np.ndarray:
    """The bytes of one tensor, uint8 of its rows."""
    rows = _rope_order(model.config, full_name)
    name = full_name.rpartition(".")[0]
    if key == "weight" and name in types:
        assert isinstance(layer, QuantLinear)
        scale, zero_point = layer.grid()
        blocks = encode_blocks(layer.codes(), scale, zero_point, types[name])
        return blocks if rows is None else blocks[rows.numpy()]
    values = (
        layer.fake_quantized_weight() if isinstance(layer, QuantizedWeight) and key == "weight" else tensor
    )
    values = values if rows is None else values[rows]
    kind = _float_type(model, values)
    dtype = next(dtype for dtype, name in _FLOATS.items() if name == kind)
    return values.to(dtype).contiguous().view(torch.uint8).numpy()


def _rope_order(config: Any, name: str) -> Tensor | None:
    """Order of the rows of queries and keys: llama.cpp rotates neighbours, transformers rotates halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.split(".")[-2]
    if projection not in heads:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = torch.arange(heads[projection] * head).view(heads[projection], 2, head // 2)
    return rows.transpose(1, 2).reshape(-1)


def encode_blocks(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, kind: GGMLQuantizationType
) -> np.ndarray:
    """Lay codes out in ggml's blocks.

    Args:
        codes: int8 `[N, K]`, K a multiple of 32.
        scale: `[N, K / 32]`, exact in fp16.
        zero_point: integers `[N, K / 32]`, for Q4_1.
        kind: Q4_0, Q4_1 or Q8_0.

    Returns:
        uint8 `[N, bytes of a row]`.
    """
    blocks = codes.view(len(codes), -1, _BLOCK)
    parts = [_fp16_bytes(scale)]
    if kind == GGMLQuantizationType.Q8_0:
        parts.append(blocks.view(torch.uint8))
    else:
        unsigned = (blocks.to(torch.int16) + 8).to(torch.uint8)
        if kind == GGMLQuantizationType.Q4_1:
            assert zero_point is not None
            # Q4_1 stores x = code · d + m; here x = (code − 8 − zero point) · d.
            parts.append(_fp16_bytes((-8 - zero_point) * scale))
        parts.append(unsigned[..., : _BLOCK // 2] | (unsigned[..., _BLOCK // 2 :] << 4))
    return torch.cat(parts, dim=-1).flatten(1).contiguous().numpy()


def _fp16_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16)[..., None].contiguous().view(torch.uint8)
