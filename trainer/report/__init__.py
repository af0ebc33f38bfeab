"""The report of a run: `report.json`, `report.html` and static plots."""

from __future__ import annotations

from pathlib import Path

from qatapult.trainer.run_folder import RunFolder, write_json


def write_report(run: RunFolder | Path, plots: bool = True) -> Path:
    """Build or rebuild the report of a run, finished or not.

    Args:
        run: the run's folder.
        plots: draw the static plots too, which takes longer than all the rest.

    Returns:
        Path of `report.html`; `report.json` and `plots/` lie beside it.
    """
    from qatapult.trainer.report.curves import read_curves
    from qatapult.trainer.report.html import write_html
    from qatapult.trainer.report.plots import write_plots
    from qatapult.trainer.report.summary import summarize

    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    report, curves = summarize(folder), read_curves(folder.read_metrics())
    write_json(folder.report_json, report)
    if plots:
        write_plots(folder.plots, report, curves)
    return write_html(folder, report, curves)
