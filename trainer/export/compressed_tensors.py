"""compressed-tensors: the format that transformers and vLLM load.

Weights of 8 bits with 8-bit inputs are stored as int8 (`int-quantized`); everything else is packed into int32
words (`pack-quantized`). Inputs are quantized per token while the model runs, by the rule that training used
(largest magnitude over 127.5). Embeddings, norms and skipped layers keep the checkpoint's own dtype; scales
are stored in it too, because vLLM and transformers compute in the dtype of the scales.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qatapult.kernels import Scheme
from qatapult.trainer.evaluate.perplexity import token_losses
from qatapult.trainer.export.folder import appearing, source_dtype, write_config
from qatapult.trainer.export.shards import ShardWriter
from qatapult.trainer.export.trained import TrainedModel, tied_names
from qatapult.trainer.quantize.modules import QuantizedWeight, QuantLinear
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.deployment import check_compressed_tensors
from qatapult.trainer.recipe.errors import UserError


def export(model: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and vLLM load.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        folder: replaced if it exists.

    Raises:
        UserError: for a grid that the format's runtimes do not take; nothing is written then.
    """
    linears = _linears(model)
    for name, layer in linears.items():
        try:
            check_compressed_tensors(layer.weight_scheme, layer.activation_scheme)
        except ValueError as error:
            raise UserError(f"export compressed-tensors: layer {name} has {error}") from None
    if "lm_head" in linears and tied_names(model.skeleton):
        raise UserError(
            "export compressed-tensors: lm_head is quantized and tied to the embeddings; "
            "add it to quantization.skip"
        )
    dtype = source_dtype(model)
    with appearing(folder) as building:
        writer = ShardWriter(building)
        for name, layer in model.layers():  # type: ignore[assignment]
            for key, tensor in _stored(layer, dtype).items():
                writer.add(f"{name}.{key}" if name else key, tensor)
        writer.close()
        write_config(model, tokenizer, building, dtype, quantization_config(model))


def reload(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the folder as a stock transformers does; token losses of ids, `[B, S]` to `[B, S − 1]`."""
    from compressed_tensors.offload.utils import as_single_threaded

    # Only the main process is here: without being told, the library would wait for the others. It also draws
    # progress bars of its own.
    with as_single_threaded(), contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()
        loaded(
            torch.zeros(1, 1, dtype=torch.int64, device=device)
        )  # the weights are unpacked at the first call
    return lambda ids: token_losses(loaded, ids.to(device))


def quantization_config(model: TrainedModel) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: one group for each pair of grids."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    linears = _linears(model)
    groups: dict[tuple[Scheme | None, Scheme | None], list[str]] = {}
    for name, layer in linears.items():
        groups.setdefault((layer.weight_scheme, layer.activation_scheme), []).append(name)
    schemes = {}
    for number, ((weights, activations), names) in enumerate(groups.items()):
        assert weights is not None
        schemes[f"group_{number}"] = QuantizationScheme(
            targets=["Linear"] if len(groups) == 1 else names,
            weights=_arguments(weights),
            input_activations=_arguments(activations) if activations else None,
            format=_format(weights, activations),
        )
    formats = {scheme.format for scheme in schemes.values()}
    config = QuantizationConfig(
        config_groups=schemes,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[
            name
            for name, module in model.skeleton.named_modules()
            if isinstance(module, nn.Linear) and name not in linears
        ],
    )
    return {"version": __version__} | config.model_dump(mode="json")


def _linears(model: TrainedModel) -> dict[str, QuantLinear]:
    layers = quant_layers(model.skeleton)
    return {name: layer for name, layer in layers.items() if isinstance(layer, QuantLinear)}


def _format(weights: Scheme, activations: Scheme | None) -> str:
    return "int-quantized" if weights.bits == 8 and activations is not None else "pack-quantized"


def _arguments(scheme: Scheme) -> dict[str, Any]:
    dynamic = scheme.granularity == "token"
    return {
        "num_bits": int(scheme.bits),
        "type": "int",
        "strategy": scheme.granularity,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "dynamic": dynamic,
        "observer": None if dynamic else "minmax",
    }


def _stored(layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer as the format names them."""
    if isinstance(layer, QuantLinear):
        return _stored_linear(layer, dtype)
    if isinstance(layer, QuantizedWeight):
        return {"weight": layer.fake_quantized_weight().to(dtype)}
    return {key: _cast(tensor, dtype) for key, tensor in layer.state_dict().items()}


def _stored_linear(layer: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    weights = layer.weight_scheme
    assert weights is not None
    scale, _ = layer.grid()
    codes = layer.codes()
    tensors = {"weight_scale": scale.to(dtype)}
    if _format(weights, layer.activation_scheme) == "int-quantized":
        tensors["weight"] = codes
    else:
        tensors["weight_packed"] = pack_to_int32(codes, int(weights.bits))
        tensors["weight_shape"] = torch.tensor(codes.shape)
    if layer.bias is not None:
        tensors["bias"] = layer.bias.to(dtype)
    return tensors


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
