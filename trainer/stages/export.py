"""Stage `export`: the trained model in the formats that other runtimes load, each loaded and measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qatapult.trainer.context import Context
from qatapult.trainer.evaluate.perplexity import Perplexity, document_losses
from qatapult.trainer.export.card import write_card
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.models import load_config
from qatapult.trainer.recipe.schema import ExportFormat

#: Each module has `export(model, tokenizer, folder)` and `reload(folder, device)`.
_WRITERS: dict[ExportFormat, str] = {
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "torchao": "torchao",
    "safetensors": "plain",
}
#: Largest relative difference of perplexity between an export in its own runtime and the packed model.
TOLERANCE = 0.01


def run(context: Context) -> dict[str, Any]:
    """Write every format that the recipe names."""
    meter = context.meter()
    formats = {name: write(context, name) for name in context.recipe.export}
    return {"formats": formats, "cost": meter.cost(len(formats) * context.data.held_out.numel())}


def write(context: Context, export_format: ExportFormat, folder: Path | None = None) -> dict[str, Any]:
    """Write one format, load it with its own runtime, and measure its perplexity.

    Args:
        context: a run whose stages up to `packed` are finished.
        export_format: the format.
        folder: where it goes; by default into the run's folder.

    Returns:
        Its entry of `stages/export.json`: path, bytes, perplexity, and its relative difference to the packed
        model's.
    """
    writer = importlib.import_module(f"qatapult.trainer.export.{_WRITERS[export_format]}")
    target = folder or context.run.export(export_format)
    writer.export(open_trained(context), context.tokenizer, target)
    measured = _measure(context, writer.reload(target, context.device), export_format)
    packed = context.run.read_stage("packed")["perplexity"]
    difference = measured.value / packed - 1
    if abs(difference) > TOLERANCE:
        context.console.warn(
            f"{export_format}: perplexity {measured.value:.2f} in its own runtime differs from the packed "
            f"model's {packed:.2f} by {difference:+.1%}"
        )
    result = {
        "path": str(target.relative_to(context.run.path)) if folder is None else str(target),
        "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        "perplexity": measured.value,
        "difference": difference,
    }
    write_card(target, context.run, context.recipe, export_format, result)
    return result


def open_trained(context: Context) -> TrainedModel:
    """The trained model, layer by layer from the training stage's file."""
    recipe = context.recipe
    return TrainedModel.stored(
        load_config(recipe.model),
        recipe.quantization,
        recipe.qat.method,
        context.run.artifact("qat") / "model.safetensors",
    )


def _measure(context: Context, losses_of: Any, description: str) -> Perplexity:
    data = context.data
    with context.console.progress(data.held_out.numel(), description[:9]) as meter:
        return document_losses(losses_of, data.held_out, data.held_out_documents, on_progress=meter.update)
