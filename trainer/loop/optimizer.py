"""Which parameters train, and at which rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from qatapult.trainer.loop.schedules import learning_rate, scale_learning_rate
from qatapult.trainer.quantize import lora
from qatapult.trainer.quantize.modules import QuantizedWeight
from qatapult.trainer.quantize.prepare import quant_layers
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe, Trainable

_GRID_PARAMETERS = ("weight_scale", "weight_zero_point", "activation_clip")


def select_trainable(model: nn.Module, trainable: Trainable) -> None:
    """Set `requires_grad` of every parameter as the recipe asks.

    Raises:
        UserError: if nothing would train.
    """
    model.requires_grad_(trainable == "all")
    for layer in quant_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(_trains(name, trainable))
    if trainable != "all" and not quant_layers(model):
        for module in model.modules():  # the full-precision control trains the layers that QAT would
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
                module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"qat.trainable '{trainable}': this model has nothing of the kind to train")


def _trains(name: str, trainable: Trainable) -> bool:
    """Whether a quantized layer's parameter trains, by its name within the layer."""
    if trainable in ("all", "linears"):
        return True
    return name in _GRID_PARAMETERS or (trainable == "lora" and name in (lora.DOWN, lora.UP))


def grid_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Learned scales, zero points and clips."""
    return [
        parameter
        for layer in quant_layers(model).values()
        for name, parameter in layer.named_parameters(recurse=False)
        if name in _GRID_PARAMETERS
    ]


def grid_scales(model: nn.Module) -> list[nn.Parameter]:
    """Learned scales alone."""
    scales = (layer.weight_scale for layer in quant_layers(model).values())
    return [scale for scale in scales if isinstance(scale, nn.Parameter)]


def build_optimizer(model: nn.Module, recipe: Recipe, steps: int) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with a group for scales.

    Adam moves every parameter by about its learning rate, whatever its size, so the rate of the scales is given
    relative to a scale's size and multiplied with their geometric mean.
    """
    settings = recipe.qat.optimizer
    rate = learning_rate(settings, weight_bits(model), steps)
    grid = {id(parameter) for parameter in grid_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if id(parameter) not in grid]
    scales = [parameter for parameter in trained if id(parameter) in grid]
    groups = []
    if weights:
        groups.append({"params": weights, "lr": rate, "weight_decay": settings.weight_decay})
    if scales:
        relative = scale_learning_rate(settings, rate)
        groups.append({"params": scales, "lr": relative * mean_scale(model), "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)


def weight_bits(model: nn.Module) -> float:
    """Fewest bits that any layer's weights have; 8 for a model in full precision."""
    schemes = (layer.weight_scheme for layer in quant_layers(model).values())
    return min((scheme.bits for scheme in schemes if scheme is not None), default=8)


@torch.no_grad()
def mean_scale(model: nn.Module) -> float:
    """Geometric mean of the weights' scales."""
    layers: list[QuantizedWeight] = list(quant_layers(model).values())
    logs = [
        layer.weight_scale.float().log().mean().item() for layer in layers if layer.weight_scale is not None
    ]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
