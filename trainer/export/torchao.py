"""torchao's serialized tensors: weight-only grids of 4 and 8 bits, as `IntxUnpackedToInt8Tensor`.

transformers loads them with torchao installed. torchao keeps such codes one a byte, in memory and on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TorchAoConfig

from qatapult.kernels import Scheme
from qatapult.trainer.evaluate.perplexity import token_losses
from qatapult.trainer.export.folder import appearing, source_dtype, write_config
from qatapult.trainer.export.shards import ShardWriter
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.quantize.modules import QuantizedWeight, QuantLinear
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.deployment import check_torchao
from qatapult.trainer.recipe.errors import UserError

_ONE_FILE = 1 << 62  # torchao describes all tensors in the header of every shard


def export(model: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that transformers loads with torchao.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        folder: replaced if it exists.

    Raises:
        UserError: for a grid that torchao does not describe; nothing is written then.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    scheme = _check(model)
    dtype = source_dtype(model)
    names: list[str] = []
    with appearing(folder) as building:
        writer = ShardWriter(building, _ONE_FILE)
        for name, layer in model.layers():
            tensors = {
                f"{name}.{key}" if name else key: tensor for key, tensor in _tensors(layer, dtype).items()
            }
            names += tensors
            stored, metadata = flatten_tensor_state_dict(tensors)
            for key, tensor in stored.items():
                writer.add(key, tensor)
            writer.metadata |= metadata
        writer.metadata["tensor_names"] = json.dumps(names)
        writer.close()
        write_config(model, tokenizer, building, dtype, quantization_config(model, scheme))


def reload(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the folder as a stock transformers does; token losses of ids, `[B, S]` to `[B, S − 1]`."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()
    return lambda ids: token_losses(loaded, ids.to(device))


def quantization_config(model: TrainedModel, scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` of `config.json`."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    quantized = quant_layers(model.skeleton)
    config = TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{int(scheme.bits)}"),
            granularity=PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC,
        ),
        modules_to_not_convert=[
            name
            for name, module in model.skeleton.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in quantized
        ],
    )
    return config.to_dict()


def _check(model: TrainedModel) -> Scheme:
    schemes = set()
    for name, layer in quant_layers(model.skeleton).items():
        if not isinstance(layer, QuantLinear):
            continue
        try:
            check_torchao(layer.weight_scheme, layer.activation_scheme)
        except ValueError as error:
            raise UserError(f"export torchao: layer {name} has {error}") from None
        assert layer.weight_scheme is not None
        schemes.add(layer.weight_scheme)
    if len(schemes) > 1:
        raise UserError(
            "export torchao: layers have different grids; use compressed-tensors, which describes them"
        )
    return schemes.pop()


def _tensors(layer: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    if isinstance(layer, QuantLinear) and layer.weight_scheme is not None:
        bias = {} if layer.bias is None else {"bias": layer.bias.detach().to(dtype)}
        return {"weight": _weight(layer, layer.weight_scheme, dtype), **bias}
    if isinstance(layer, QuantizedWeight):
        return {"weight": layer.fake_quantized_weight().detach().to(dtype)}
    return {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in layer.state_dict().items()
    }


def _weight(layer: QuantLinear, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scale, zero_point = layer.grid()
    return IntxUnpackedToInt8Tensor(
        qdata=layer.codes(),
        scale=scale.detach().to(dtype),
        zero_point=torch.zeros_like(scale, dtype=torch.int8)
        if zero_point is None
        else zero_point.round().to(torch.int8),
        target_dtype=getattr(torch, f"int{int(scheme.bits)}"),
        block_size=(1, scheme.block_size(layer.in_features)),
        dtype=dtype,
        activation_quantization=None,
    )
