"""Stage `export`: the trained model in the formats that other runtimes load."""

from __future__ import annotations

import importlib
from typing import Any

from qatapult.trainer.context import Context
from qatapult.trainer.recipe.schema import ExportFormat
from qatapult.trainer.stages.qat import load_trained

_WRITERS: dict[ExportFormat, str] = {
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "torchao": "torchao",
    "safetensors": "plain",
}


def run(context: Context) -> dict[str, Any]:
    """Write every format that the recipe names."""
    meter = context.meter()
    formats: dict[str, Any] = {}
    for name in context.recipe.export:
        context.console.say(f"  {name}")
        writer = importlib.import_module(f"qatapult.trainer.export.{_WRITERS[name]}")
        folder = context.run.export(name)
        writer.export(load_trained(context), context.tokenizer, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        formats[name] = {"path": str(folder.relative_to(context.run.path)), "bytes": size, "perplexity": None}
    return {"formats": formats, "cost": meter.cost(0)}
