"""Is training worth it? Quality against a tolerance, training cost against what serving saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from typing import Any, Literal, cast

from qatapult.trainer.plan.evidence import Evidence, Expectation, expect, serving_saving, typical_ptq_loss
from qatapult.trainer.plan.hardware import Cluster
from qatapult.trainer.plan.matrix import SCENARIOS, Cell, Scenario, cell
from qatapult.trainer.plan.planner import make_plan, require_fit
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.report.text import dollars

Verdict = Literal["ship PTQ", "train", "train with mixed precision", "do not train", "stay in full precision"]
_YEAR = 365.0


@dataclass(frozen=True)
class Situation:
    """What the advice is about.

    Attributes:
        scenario: where the model is served.
        weight_bits: bits of the weights.
        activation_bits: bits of the activations, 16 if not quantized.
        tolerance: relative loss of perplexity that is acceptable, such as 0.02.
        ptq_loss: relative loss of perplexity by the best post-training method, measured; None if it was not.
        training_cost: US dollars.
        training_days: wall time.
        serving_cost: US dollars a year for serving in 16 bits.
        saving: share of that saved at the lower precision; None for the default of these bits.
        start: first day of training.
    """

    scenario: Scenario
    weight_bits: float
    activation_bits: float
    tolerance: float
    ptq_loss: float | None
    training_cost: float
    training_days: float
    serving_cost: float
    saving: float | None = None
    start: date = date(2026, 1, 1)

    def check(self) -> None:
        """Refuse impossible figures.

        Raises:
            UserError: naming the option and what would be right.
        """
        for name in ("tolerance", "training_cost", "training_days", "serving_cost"):
            value = getattr(self, name)
            if value < 0:
                raise UserError(f"--{name.replace('_', '-')} {value:g} is negative")
        if self.saving is not None and not 0 <= self.saving < 1:
            raise UserError(f"--saving {self.saving:g} is not a share of the serving cost, such as 0.5")

    def with_ptq_loss(self, loss: float) -> Situation:
        """The same situation with a measured loss."""
        return replace(self, ptq_loss=loss)


def situation_of(
    recipe: Recipe,
    cluster: Cluster,
    *,
    scenario: str,
    tolerance: float,
    training_days: float | None,
    serving_cost: float | None,
    tokens_per_day: float | None,
    price_per_million: float | None,
    saving: float | None,
    start: date,
    ptq_loss: float | None = None,
) -> Situation:
    """The situation of a recipe on a cluster; what is not given is planned.

    Args:
        training_days: on this cluster; by default those of the recommended setting of the recipe's plan.
        serving_cost: US dollars a year; or `tokens_per_day` and `price_per_million` (US dollars) instead.

    Raises:
        UserError: for figures that make no sense or contradict each other.
    """
    if scenario not in SCENARIOS:
        raise UserError(f"--scenario {scenario!r} is not one of {', '.join(SCENARIOS)}")
    if recipe.quantization.weights is None:
        raise UserError("quantization.weights is null: advice is about lower-precision weights")
    if serving_cost is None:
        if tokens_per_day is None or price_per_million is None:
            raise UserError("give --serving-cost, or both --tokens-per-day and --price-per-million")
        for name, value in (("tokens-per-day", tokens_per_day), ("price-per-million", price_per_million)):
            if value < 0:
                raise UserError(f"--{name} {value:g} is negative")
        serving_cost = tokens_per_day * _YEAR * price_per_million / 1e6
    if training_days is None:
        training_days = require_fit(make_plan(recipe, cluster)).hours / 24
    activations = recipe.quantization.activations
    situation = Situation(
        scenario=cast(Scenario, scenario),
        weight_bits=recipe.quantization.weights.bits,
        activation_bits=activations.bits if activations else 16,
        tolerance=tolerance,
        ptq_loss=ptq_loss,
        training_cost=training_days * 24 * cluster.world * cluster.price,
        training_days=training_days,
        serving_cost=serving_cost,
        saving=saving,
        start=start,
    )
    situation.check()
    return situation


@dataclass(frozen=True)
class Economics:
    """Money and time.

    Attributes:
        yearly_saving: US dollars a year of serving at the lower precision.
        payback_days: days of serving that pay the training; None if they never do.
        break_even: the day on which the training is paid; None if never.
    """

    yearly_saving: float
    training_cost: float
    payback_days: float | None
    break_even: date | None
    first_year_net: float


@dataclass(frozen=True)
class Advice:
    """The answer with everything it rests on."""

    situation: Situation
    verdict: Verdict
    reasons: list[str]
    matrix: Cell
    expectation: Expectation | None
    ptq_loss: float
    ptq_loss_source: str
    expected_loss: tuple[float, float, float] | None
    saving: float
    saving_source: str
    economics: Economics
    sensitivity: list[tuple[str, Economics]]

    def as_json(self) -> dict[str, Any]:
        """The advice in plain types; dates as ISO strings."""
        return {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "matrix": asdict(self.matrix),
            "situation": asdict(self.situation) | {"start": self.situation.start.isoformat()},
            "ptq_loss": self.ptq_loss,
            "ptq_loss_source": self.ptq_loss_source,
            "recovery": None
            if self.expectation is None
            else {
                "expected": self.expectation.middle,
                "interval": [self.expectation.low, self.expectation.high],
                "note": self.expectation.note,
                "evidence": [asdict(item) for item in self.expectation.evidence],
            },
            "expected_loss": self.expected_loss,
            "saving": self.saving,
            "saving_source": self.saving_source,
            "economics": _economics_json(self.economics),
            "sensitivity": [{"if": name} | _economics_json(value) for name, value in self.sensitivity],
        }


def advise(situation: Situation, evidence: list[Evidence]) -> Advice:
    """Judge a situation.

    Raises:
        UserError: for figures that make no sense.
    """
    situation.check()
    loss, source = situation.ptq_loss, "measured"
    if loss is None:
        loss, source = typical_ptq_loss(situation.weight_bits, situation.activation_bits)
        source = f"typical, not measured ({source})"
    saving, saving_source = situation.saving, "given"
    if saving is None:
        saving, saving_source = serving_saving(situation.weight_bits)
    expectation = expect(situation.weight_bits, situation.activation_bits, evidence)
    left = None
    if expectation is not None:
        left = tuple(
            max(0.0, loss * (1 - part)) for part in (expectation.middle, expectation.high, expectation.low)
        )
    economics = economics_of(situation, saving)
    verdict, reasons = _judge(situation, loss, source, left, saving, economics)
    return Advice(
        situation=situation,
        verdict=verdict,
        reasons=reasons,
        matrix=cell(situation.scenario, situation.weight_bits),
        expectation=expectation,
        ptq_loss=loss,
        ptq_loss_source=source,
        expected_loss=left,  # type: ignore[arg-type]
        saving=saving,
        saving_source=saving_source,
        economics=economics,
        sensitivity=_sensitivity(situation, saving),
    )


def economics_of(situation: Situation, saving: float) -> Economics:
    """When serving at the lower precision has paid for the training.

    The saving begins when training ends: before that, the model is served as it was.
    """
    yearly = situation.serving_cost * saving
    payback = None if yearly <= 0 else situation.training_cost / yearly * _YEAR
    day = None
    if payback is not None and payback < 100 * _YEAR:
        day = situation.start + timedelta(days=round(situation.training_days + payback))
    served = max(0.0, _YEAR - situation.training_days) / _YEAR
    return Economics(yearly, situation.training_cost, payback, day, yearly * served - situation.training_cost)


def _judge(
    situation: Situation,
    loss: float,
    source: str,
    left: tuple[float, ...] | None,
    saving: float,
    economics: Economics,
) -> tuple[Verdict, list[str]]:
    tolerance = situation.tolerance
    reasons = [
        f"Post-training quantization loses {loss:.1%} of perplexity ({source}); "
        f"{tolerance:.1%} is acceptable."
    ]
    if loss <= tolerance:
        reasons.append(
            "That is within the tolerance: training could only improve what is good enough. Stop, ship PTQ."
        )
        return "ship PTQ", reasons
    if left is None:
        reasons.append(
            "Nothing is known about recoveries at these bits: run a small study before you decide."
        )
        return ("train" if situation.scenario == "research" else "do not train"), reasons
    expected, best, worst = left
    reasons.append(f"After training {expected:.1%} are expected to remain ({best:.1%} to {worst:.1%}).")
    mixed = cell(situation.scenario, situation.weight_bits).action == "train, mixed precision"
    if best > tolerance:
        reasons.append(
            "Even the best recovery known misses the tolerance: raise the bits of the sensitive layers "
            "(qatapult search) or of all of them."
        )
        return (
            "train with mixed precision" if situation.scenario == "research" or mixed else "do not train"
        ), reasons
    if expected > tolerance:
        reasons.append(
            "That is expected to miss the tolerance: keep the sensitive layers in 8 bits (qatapult search)."
        )
        mixed = True
    if situation.scenario in ("mobile", "edge", "research"):
        reasons.append(
            "Here the bits are given by the device or the question, so that serving cost does not decide."
        )
        return ("train with mixed precision" if mixed else "train"), reasons
    if economics.payback_days is None:
        reasons.append("No serving cost is saved, so that nothing pays for the training.")
        return "stay in full precision", reasons
    reasons.append(
        f"Serving saves {dollars(economics.yearly_saving)} a year ({saving:.0%}) and training costs "
        f"{dollars(economics.training_cost)}: paid "
        + (
            f"after {days:,.0f} days of serving."
            if (days := economics.payback_days) >= 1
            else "within a day."
        )
    )
    if economics.first_year_net < 0:
        reasons.append("That is more than the first year saves.")
        return "do not train", reasons
    return ("train with mixed precision" if mixed else "train"), reasons


def _sensitivity(situation: Situation, saving: float) -> list[tuple[str, Economics]]:
    """The break-even date when one figure is wrong."""
    changes: list[tuple[str, Callable[[Situation], Situation], float]] = [
        ("training costs half", lambda s: replace(s, training_cost=s.training_cost / 2), saving),
        ("training costs twice as much", lambda s: replace(s, training_cost=s.training_cost * 2), saving),
        (
            "training has to be repeated",
            lambda s: replace(s, training_cost=s.training_cost * 2, training_days=s.training_days * 2),
            saving,
        ),
        ("half of the tokens are served", lambda s: replace(s, serving_cost=s.serving_cost / 2), saving),
        ("twice the tokens are served", lambda s: replace(s, serving_cost=s.serving_cost * 2), saving),
        ("lower precision saves half of that", lambda s: s, saving / 2),
    ]
    return [(name, economics_of(change(situation), share)) for name, change, share in changes]


def _economics_json(economics: Economics) -> dict[str, Any]:
    fields = asdict(economics)
    fields["break_even"] = economics.break_even.isoformat() if economics.break_even else None
    return fields
