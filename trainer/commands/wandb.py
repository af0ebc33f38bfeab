"""`qatapult wandb dashboard`: a workspace and a report on wandb."""

from __future__ import annotations

from typing import Annotated

import typer

from qatapult.trainer.recipe.errors import UserError


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Pages on Weights & Biases.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("dashboard")(dashboard)
    app.add_typer(group, name="wandb")


def dashboard(
    entity: Annotated[str, typer.Option(help="User or team that owns the project.")],
    project: Annotated[str, typer.Option(help="Project, as in the recipe's tracking.project.")] = "qatapult",
    group: Annotated[str | None, typer.Option(help="Only the runs of this group (a sweep).")] = None,
) -> None:
    """Create a workspace and a report with recovery curves for a project's runs; needs a wandb key.

    Example: qatapult wandb dashboard --entity my-team --project qatapult
    """
    try:
        import wandb

        from qatapult.trainer.tracking.wandb_pages import build_report, build_workspace
    except ImportError:
        raise UserError("wandb is not installed: pip install 'qatapult[wandb]'") from None
    from qatapult.trainer.tracking.wandb_run import answers, has_key, server

    if not has_key():
        raise UserError("no wandb key: run `wandb login`, or set WANDB_API_KEY")
    if not answers(server()):
        raise UserError(f"{server()} does not answer; creating pages needs the network")
    try:
        workspace = build_workspace(entity, project).save()
        report = build_report(entity, project, group).save()
    except wandb.Error as error:
        raise UserError(f"wandb refused: {' '.join(str(error).split())[:200]}") from None
    typer.echo(f"workspace: {workspace.url}")
    typer.echo(f"report: {report.url}")
