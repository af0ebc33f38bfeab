"""Stage `baseline`: the full-precision model, which is 100 % by definition."""

from __future__ import annotations

from typing import Any

from qatapult.trainer.context import Context


def run(context: Context) -> dict[str, Any]:
    """Measure the full-precision model."""
    meter = context.meter()
    model = context.load_model()
    result = context.perplexity(model, "baseline")
    judged = context.judge(model, "baseline")
    return {"perplexity": result.value, "losses": result.losses, **judged, "cost": meter.cost(result.tokens)}
