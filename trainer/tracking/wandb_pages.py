"""A workspace and a report on wandb with recovery curves, made through the wandb-workspaces library."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

#: Sections of the workspace: title, and its plots as (title, metrics, logarithmic).
SECTIONS: tuple[tuple[str, tuple[tuple[str, tuple[str, ...], bool], ...]], ...] = (
    (
        "Recovery",
        (
            ("Held-out perplexity", ("eval/perplexity",), False),
            ("Share of round-to-nearest's loss won back", ("recovery/perplexity",), False),
        ),
    ),
    (
        "Training",
        (
            ("Loss", ("train/loss", "train/kl"), False),
            ("Gradient norm", ("train/grad_norm",), True),
            ("Learning rate", ("train/learning_rate",), False),
            ("Tokens per second", ("train/tokens_per_second",), False),
        ),
    ),
)
#: Figures of the packed model, which a finished run leaves in its summary.
FINAL = (
    ("Perplexity of the packed model", "final/perplexity/packed"),
    ("Recovered", "final/perplexity/recovery"),
)


def build_workspace(entity: str, project: str) -> workspaces.Workspace:
    """A saved view of a project: recovery first, everything over tokens."""
    sections = [workspaces.Section(name="Results", panels=_results(), is_open=True)]
    sections += [
        workspaces.Section(name=title, panels=_plots(plots), is_open=True) for title, plots in SECTIONS
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Qatapult",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="tokens"),
    )


def build_report(entity: str, project: str, group: str | None = None) -> reports.Report:
    """A report about a project's runs, or about those of one group (a sweep)."""
    runs = reports.Runset(
        entity=entity, project=project, name=group or "runs", filters=f"group == '{group}'" if group else ""
    )
    blocks: list[Any] = [
        reports.P(
            text="Recovery is the share of what round-to-nearest quantization lost that training won back, "
            "measured on the packed integers that will be served. The x axis of every curve is tokens."
        ),
        reports.H2(text="Results"),
        reports.PanelGrid(runsets=[runs], panels=_results()),
    ]
    for title, plots in SECTIONS:
        blocks += [reports.H2(text=title), reports.PanelGrid(runsets=[runs], panels=_plots(plots))]
    return reports.Report(
        entity=entity,
        project=project,
        title="What quantization cost, and what came back",
        description="Made by qatapult wandb dashboard.",
        blocks=blocks,
    )


def _plots(plots: tuple[tuple[str, tuple[str, ...], bool], ...]) -> list[Any]:
    return [
        reports.LinePlot(title=title, x="tokens", y=list(metrics), log_y=logarithmic)
        for title, metrics, logarithmic in plots
    ]


def _results() -> list[Any]:
    return [
        reports.BarPlot(title=title, metrics=[reports.SummaryMetric(metric)], orientation="h")
        for title, metric in FINAL
    ]
