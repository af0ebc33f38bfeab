"""`qatapult generate` and `qatapult chat`: the packed model at work."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qatapult.trainer.evaluate.models import Models
    from qatapult.trainer.generate import Generated, Sampling

FolderArgument = Annotated[Path, typer.Argument(help="A run's folder, or a Hugging Face model folder.")]
ModelOption = Annotated[
    str, typer.Option(help="Which of a run's models: full_precision, ptq, qat or packed.")
]
TokensOption = Annotated[int, typer.Option(min=1, help="Write at most so many tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 always takes the most likely token.")]
TopPOption = Annotated[float, typer.Option(min=0, max=1, help="Sample among the tokens of this probability.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)
    app.command("chat")(chat)


def generate(
    folder: FolderArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: ModelOption = "packed",
    tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of streaming.")] = False,
) -> None:
    """Continue a prompt with the packed model, streaming.

    The text goes to standard output; what ran and how fast, to standard error.

    Example: qatapult generate runs/smollm2-135m-w4a8 "The with statement is used to" --tokens 40
    """
    from qatapult.trainer.evaluate.kernels import counting
    from qatapult.trainer.generate import Sampling

    models = _open(folder)
    ids = _prompt_ids(models, prompt)
    loaded = models.load(model)
    sampling = Sampling(tokens, temperature, top_p, seed)
    with counting(loaded) as kernels:
        written = _write(models, loaded, model, ids, sampling, show=not as_json)
    if as_json:
        facts = dataclasses.asdict(written) | {"tokens_per_second": written.tokens_per_second}
        typer.echo(json.dumps({"prompt": prompt, "model": model, **facts, "kernels": kernels}, indent=2))
        return
    typer.echo()
    typer.echo(_figures(written, kernels), err=True)


def chat(
    folder: FolderArgument,
    model: ModelOption = "packed",
    tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.6,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Talk with the packed model. An empty line or Ctrl-D ends it.

    Example: qatapult chat runs/smollm2-135m-w4a8
    """
    from qatapult.trainer.generate import Sampling
    from qatapult.trainer.recipe.errors import UserError

    models = _open(folder)
    if models.tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template; use qatapult generate")
    loaded = models.load(model)
    messages = [{"role": "system", "content": system}] if system else []
    while (line := _ask()) is not None:
        messages.append({"role": "user", "content": line})
        template: Any = models.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = template["input_ids"][0]
        written = _write(models, loaded, model, ids, Sampling(tokens, temperature, top_p, seed), show=True)
        typer.echo()
        messages.append({"role": "assistant", "content": written.text})


def _open(folder: Path) -> Models:
    from qatapult.trainer.evaluate.models import open_models

    return open_models(folder)


def _prompt_ids(models: Models, prompt: str) -> Any:
    from qatapult.trainer.recipe.errors import UserError

    ids = models.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    if len(ids) == 0:
        raise UserError("the prompt is empty; give some text to continue")
    return ids.long()


def _write(
    models: Models, loaded: PreTrainedModel, model: str, ids: Any, sampling: Sampling, show: bool
) -> Generated:
    from qatapult.trainer import generate as generation

    def print_piece(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    kv_cache = None if model == "full_precision" else models.recipe.quantization.kv_cache
    return generation.generate(
        loaded, models.tokenizer, ids, sampling, print_piece if show else lambda text: None, kv_cache
    )


def _ask() -> str | None:
    """The next line of the user; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return line or None


def _figures(written: Generated, kernels: dict[str, Any]) -> str:
    total = kernels["linears"]
    ran = ", ".join(f"{count} of {total} linears ran {kind}" for kind, count in kernels["by_kind"].items())
    return (
        f"{written.prompt_tokens} + {written.tokens} tokens, first after {written.prefill_seconds:.2f} s, "
        f"then {written.tokens_per_second:.1f} tok/s; KV cache {written.cache_bytes:,} bytes"
        f"{'; ' + ran if ran else ''}"
    )
