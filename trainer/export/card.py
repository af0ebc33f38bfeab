"""The model card: what the checkpoint is, how good it is, and how it came about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qatapult.trainer.models import local_source
from qatapult.trainer.recipe.loading import dump_recipe
from qatapult.trainer.recipe.schema import ExportFormat, Model, Quantization, Recipe
from qatapult.trainer.report.summary import summarize
from qatapult.trainer.report.text import interval, metric_rows, number, percent
from qatapult.trainer.run_folder import RunFolder, write_atomically

_LIBRARY = {
    "gguf": "gguf",
    "torchao": "transformers",
    "compressed-tensors": "transformers",
    "safetensors": "transformers",
}

_HOW_TO_LOAD = {
    "compressed-tensors": """With transformers and compressed-tensors installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

transformers simulates the integers; vLLM multiplies them: `vllm serve .`""",
    "gguf": 'With llama.cpp: `llama-cli -m model.gguf -p "…"`.',
    "torchao": """With transformers and torchao installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```""",
    "safetensors": """With transformers alone; the quantized weights are written out in floating point:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```""",
}


def write_card(
    folder: Path, run: RunFolder, recipe: Recipe, export_format: ExportFormat, result: dict[str, Any]
) -> None:
    """Write `README.md` into an exported folder.

    Args:
        folder: the export.
        run: the run that it came from.
        recipe: the run's recipe.
        export_format: the export's format.
        result: the export's entry of `stages/export.json`.
    """
    write_atomically(folder / "README.md", card(run, recipe, export_format, result))


def card(run: RunFolder, recipe: Recipe, export_format: ExportFormat, result: dict[str, Any]) -> str:
    """The model card's text."""
    report = summarize(run)
    metric = report["metrics"]["perplexity"]
    licence = licence_of(recipe.model)
    lines = [
        "---",
        f"license: {licence or 'other'}",
        f"base_model: {recipe.model.source}",
        f"library_name: {_LIBRARY[export_format]}",
        "pipeline_tag: text-generation",
        "tags: [quantization-aware-training, qatapult]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{report['headline']}.",
        "",
        f"- Source: `{recipe.model.source}`",
        f"- Grid: {report['format']}; in full precision: {_full_precision(recipe.quantization)}",
        f"- Stored as {export_format}, {result['bytes']:,} bytes",
        _recovery_line(metric),
        f"- Loaded again by its own runtime: perplexity {number(result['perplexity'])}, "
        f"{result['difference']:+.2%} against the packed integers",
        *_parity_lines(report),
        f"- Licence: {licence or 'not stated by the source; that of the base model applies'}",
        "",
        *_table(report),
        "",
        "Perplexity is measured on held-out documents; *packed integers* is the model as it is served.",
        "",
        "## Use",
        "",
        _HOW_TO_LOAD[export_format],
        "",
        "## Recipe",
        "",
        "```yaml",
        dump_recipe(recipe).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def licence_of(model: Model) -> str | None:
    """The source's licence as its GGUF file or model card states it."""
    source = local_source(model) if not model.source.startswith("random:") else None
    if model.source.endswith(".gguf"):
        return _gguf_licence(model)
    readme = Path(source) / "README.md" if source is not None else None
    if readme is None or not readme.is_file():
        return None
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def _gguf_licence(model: Model) -> str | None:
    from gguf import GGUFReader

    from qatapult.trainer.models import gguf_path

    field = GGUFReader(gguf_path(model.source)).get_field("general.license")
    return str(field.contents()) if field is not None else None


def _full_precision(quantization: Quantization) -> str:
    embeddings = ["embeddings"] if quantization.embeddings is None else []
    return ", ".join([*(f"`{pattern}`" for pattern in quantization.skip), "norms", *embeddings])


def _recovery_line(metric: dict[str, Any]) -> str:
    bounds = metric.get("recovery_interval")
    spread = f" (95 % interval {interval(bounds)})" if bounds else ""
    line = f"- Recovered of what round-to-nearest lost: {percent(metric.get('recovery'))}{spread}"
    if metric.get("best_ptq_method") not in (None, "rtn"):
        share = percent(metric.get("recovery_from_best_ptq"))
        line += f"; of what {metric['best_ptq_method']}, the best without training, lost: {share}"
    return line


def _parity_lines(report: dict[str, Any]) -> list[str]:
    parity, kernels = report["parity"], report["kernels"]
    if not parity:
        return []
    equal = "equal bit for bit" if parity["codes_equal"] else "NOT all equal"
    return [
        f"- Parity of packed and trained model: codes {equal}, logits at {parity['sqnr_db']:.1f} dB, the "
        f"same most likely token on {percent(parity['top1_agreement'], 2)} of positions",
        f"- {kernels['integer']} of {kernels['linears']} linears were measured as products of integers",
    ]


def _table(report: dict[str, Any]) -> list[str]:
    header, *rows = metric_rows(report)
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]
