"""`qatapult recipe show|check|list`: look at a recipe without running it."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Overrides, such as qat.tokens=100000.", metavar="[KEY=VALUE]...")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Look at recipes.", no_args_is_help=True)
    group.command("show")(show)
    group.command("check")(check)
    group.command("list")(list_shipped)
    group.command("shapes")(list_shapes)
    app.add_typer(group, name="recipe")


def show(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Print the resolved recipe, every field written out.

    Example: qatapult recipe show smollm2-135m-w4a8 qat.tokens=100000
    """
    from qatapult.trainer.recipe.loading import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


def check(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check a recipe's fields and say what it would do; nothing is loaded or written.

    Example: qatapult recipe check llama-2-7b-w4a8
    """
    from qatapult.trainer.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    grid = loaded.quantization
    weights = grid.weights.scheme.describe() if grid.weights else "full precision"
    activations = grid.activations.scheme.describe() if grid.activations else "full precision"
    typer.echo(f"{loaded.name}: ok")
    typer.echo(f"  model        {loaded.model.source}")
    typer.echo(f"  weights      {weights}")
    typer.echo(f"  activations  {activations}")
    typer.echo(
        f"  training     {loaded.qat.method}, {loaded.qat.tokens:,} tokens, {loaded.qat.distillation.kind}"
    )


def list_shipped() -> None:
    """List the recipes that come with Qatapult."""
    from qatapult.trainer.recipe.loading import shipped_recipes

    for name in shipped_recipes():
        typer.echo(name)


def list_shapes() -> None:
    """List the shapes of `random:SHAPE` models.

    Example: qatapult recipe shapes
    """
    from qatapult.trainer.shapes import RANDOM_SHAPES

    for name, shape in RANDOM_SHAPES.items():
        size = f"{shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, vocabulary {shape['vocab_size']}"
        typer.echo(f"{name:<14} {size}")
