"""Plain safetensors: the quantized weights written out in floating point, for any runtime.

Nothing of the inputs' quantization is stored, so that a model trained with quantized inputs is measured
without it here and comes out a little better than what is served packed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qatapult.trainer.evaluate.perplexity import token_losses
from qatapult.trainer.export.folder import appearing, source_dtype, write_config
from qatapult.trainer.export.shards import ShardWriter
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.quantize.modules import QuantizedWeight

_GRID_TENSORS = ("weight_scale", "weight_zero_point", "activation_clip")


def export(model: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that every transformers loads.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        folder: replaced if it exists.
    """
    dtype = source_dtype(model)
    with appearing(folder) as building:
        writer = ShardWriter(building)
        for name, layer in model.layers():
            tensors = {key: tensor for key, tensor in layer.state_dict().items() if key not in _GRID_TENSORS}
            if isinstance(layer, QuantizedWeight):
                tensors["weight"] = layer.fake_quantized_weight()
            for key, tensor in tensors.items():
                stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
                writer.add(f"{name}.{key}" if name else key, stored)
        writer.close()
        write_config(model, tokenizer, building, dtype)


def reload(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the folder as any transformers does; token losses of ids, `[B, S]` to `[B, S − 1]`."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()
    return lambda ids: token_losses(loaded, ids.to(device))
