"""`qatapult teacher cache|check|write`: the teacher's logits on disk, and text of the teacher's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, QuietOption, RecipeArgument


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The full-precision teacher.", no_args_is_help=True)
    group.command("cache")(cache)
    group.command("check")(check)
    group.command("write")(write)
    app.add_typer(group, name="teacher")


def cache(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of the cache.")] = Path("teacher-cache"),
    top_k: Annotated[int, typer.Option(min=1, help="Most tokens kept at a position.")] = 64,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Keep no more tokens than hold this share of the probability."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write the teacher's likeliest tokens for a recipe's training text; run again, it goes on where it stopped.

    Several processes share the work: accelerate launch -m qatapult.trainer.cli teacher cache RECIPE

    Example: qatapult teacher cache smollm2-135m-w4a8 --out teacher-cache --top-k 64
    """
    from accelerate import PartialState

    from qatapult.trainer.console import Console
    from qatapult.trainer.data.blocks import load_data
    from qatapult.trainer.distill.cache import CacheFormat, stored_bits_per_token, verify_cache, write_cache
    from qatapult.trainer.models import load_model, load_tokenizer
    from qatapult.trainer.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    distillation = loaded.qat.distillation
    source = loaded.model
    if distillation.teacher is not None:
        source = source.model_copy(update={"source": distillation.teacher})
    state = PartialState()
    data = load_data(loaded, load_tokenizer(loaded.model))
    teacher = load_model(source).to(state.device)
    layout = CacheFormat(
        fingerprint=data.fingerprint,
        teacher=source.source,
        blocks=len(data.train),
        block_size=loaded.data.block_size,
        vocabulary=teacher.config.vocab_size,
        k=min(top_k, teacher.config.vocab_size),
        temperature=distillation.temperature,
        top_p=top_p,
    )
    own = sum(
        len(range(shard * layout.shard_blocks, min(layout.blocks, (shard + 1) * layout.shard_blocks)))
        for shard in range(state.process_index, layout.shards, state.num_processes)
    )
    with Console(quiet=quiet).progress(own, "teacher") as meter:
        write_cache(
            out,
            layout,
            teacher,
            data.train,
            state.process_index,
            state.num_processes,
            on_progress=meter.update,
        )
    state.wait_for_everyone()
    if state.is_main_process:
        verify_cache(out)
        tokens, bits = layout.blocks * layout.block_size, stored_bits_per_token(out)
        typer.echo(
            f"{out}: {tokens:,} tokens, {bits:,.0f} bits a token, {tokens * bits / 2**23:.1f} MiB; "
            f"train with qat.distillation.cache={out}"
        )


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    cached: Annotated[Path, typer.Option("--cache", help="Folder of the cache.")] = Path("teacher-cache"),
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the training text to look at.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a cache with its teacher: loss and gradient that the quantized model gets from each, bits a token.

    Example: qatapult teacher check smollm2-135m-w4a8 --cache teacher-cache
    """
    import json
    from dataclasses import asdict

    import torch

    from qatapult.trainer.data.blocks import load_data
    from qatapult.trainer.distill.cache import CachedTeacher
    from qatapult.trainer.distill.cache_check import check_cache
    from qatapult.trainer.distill.student import Student
    from qatapult.trainer.loop.optimizer import select_trainable
    from qatapult.trainer.models import load_model, load_tokenizer
    from qatapult.trainer.quantize.prepare import prepare
    from qatapult.trainer.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    distillation = loaded.qat.distillation
    data = load_data(loaded, load_tokenizer(loaded.model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = CachedTeacher(cached, data.fingerprint, distillation.temperature, device)
    teacher = load_model(loaded.model.model_copy(update={"source": reader.layout.teacher})).to(device)  # type: ignore[arg-type]
    model = load_model(loaded.model).to(device)  # type: ignore[arg-type]
    prepare(model, loaded.quantization, loaded.qat.method)
    select_trainable(model, "linears")
    found = check_cache(cached, reader, teacher, Student(model, distillation), data.train, blocks)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    typer.echo(
        f"{cached}: {found.bits_per_token:,.0f} bits a token, {found.kept_tokens:.1f} tokens a position"
    )
    typer.echo(f"  holding {found.kept_mass:.2%} of the teacher's probability, over {found.tokens:,} tokens")
    typer.echo(
        f"  loss of the round-to-nearest model: {found.cached_loss:.4f} from the cache, {found.full_loss:.4f} from "
        f"the teacher ({found.cached_loss / found.full_loss - 1:+.2%})"
    )
    typer.echo(f"  cosine of the two gradients: {found.gradient_cosine:.4f}")


def write(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="JSONL file; one that exists is gone on with.")] = Path(
        "teacher.jsonl"
    ),
    documents: Annotated[int, typer.Option(min=1, help="Documents in the file.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Longest document.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 16,
    quiet: QuietOption = False,
) -> None:
    """Let the full-precision model write training text, for a checkpoint whose data nobody has any more.

    Example: qatapult teacher write smollm2-135m-w4a8 --documents 64 --out teacher.jsonl
    """
    from accelerate import PartialState

    from qatapult.trainer.console import Console
    from qatapult.trainer.distill.writing import write_documents
    from qatapult.trainer.models import load_model, load_tokenizer
    from qatapult.trainer.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    teacher = load_model(loaded.model).to(PartialState().device)
    with Console(quiet=quiet).progress(documents, "writing") as meter:
        write_documents(
            teacher,
            load_tokenizer(loaded.model),
            out,
            documents,
            tokens,
            loaded.seed,
            batch_size,
            on_progress=meter.update,
        )
    typer.echo(f"{out}: train with data.train=[{{kind: jsonl, path: {out}}}]")
