"""`qatapult teacher cache|write`: the teacher's logits on disk, and text of the teacher's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.commands.recipe import OverridesArgument, QuietOption, RecipeArgument


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The full-precision teacher.", no_args_is_help=True)
    group.command("cache")(cache)
    group.command("write")(write)
    app.add_typer(group, name="teacher")


def cache(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of the cache.")] = Path("teacher-cache"),
    top_k: Annotated[int, typer.Option(min=1, help="Tokens kept at each position.")] = 64,
    quiet: QuietOption = False,
) -> None:
    """Write the teacher's top-k logits of a recipe's training text; run again, it goes on where it stopped.

    Several processes share the work: accelerate launch -m qatapult.trainer.cli teacher cache RECIPE

    Example: qatapult teacher cache smollm2-135m-w4a8 --out teacher-cache --top-k 64
    """
    from accelerate import PartialState

    from qatapult.trainer.console import Console
    from qatapult.trainer.data.blocks import load_data
    from qatapult.trainer.distill.cache import CacheFormat, verify_cache, write_cache
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
        size = sum(file.stat().st_size for file in out.iterdir())
        tokens = layout.blocks * layout.block_size
        typer.echo(
            f"{out}: {tokens:,} tokens, {layout.bits_per_token:,} bits a token, {size / 2**20:.1f} MiB; "
            f"train with qat.distillation.cache={out}"
        )


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
