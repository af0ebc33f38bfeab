"""Stage `report`: `report.json` and `report.html` from what the other stages left; plots follow at the end."""

from __future__ import annotations

from typing import Any

from qatapult.trainer.context import Context
from qatapult.trainer.report import write_report


def run(context: Context) -> dict[str, Any]:
    """Write the report."""
    meter = context.meter()
    write_report(context.run, plots=False)
    return {"cost": meter.cost(0)}
