"""Stage `report`: `report.json`, `report.html` and plots from what the other stages left."""

from __future__ import annotations

from typing import Any

from qatapult.trainer.context import Context
from qatapult.trainer.report import write_report


def run(context: Context) -> dict[str, Any]:
    """Write the report."""
    meter = context.meter()
    write_report(context.run)
    return {"cost": meter.cost(0)}
