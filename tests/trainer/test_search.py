"""`qatapult search`: groups, budgets, the integer program, divergence, resuming, and what it writes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qatapult.trainer.cli import app
from qatapult.trainer.console import Console
from qatapult.trainer.models import load_model
from qatapult.trainer.quantize.prepare import layer_grids, prepare
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.search.budget import Budget, make_budget
from qatapult.trainer.search.candidates import parse_candidates
from qatapult.trainer.search.divergence import Divergence
from qatapult.trainer.search.finals import finalists, judge, judging_text, second_round
from qatapult.trainer.search.groups import find_groups
from qatapult.trainer.search.learned import learned_costs
from qatapult.trainer.search.program import frontier, solve
from qatapult.trainer.search.refine import pareto
from qatapult.trainer.search.run import SearchSettings, search
from qatapult.trainer.search.sensitivity import fisher_costs, hessian_costs, slope_costs
from qatapult.trainer.search.show import overrides, write_result
from qatapult.trainer.search.state import SearchState
from qatapult.trainer.search.switching import SwitchingModel


def recipe(**quantization: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "searched",
            "model": {"source": "random:tiny"},
            "data": {"train": [{"kind": "random"}], "block_size": 32},
            "quantization": {"weights": {"bits": 4, "range": "mse"}} | quantization,
            "qat": {"tokens": 320},
            "export": [],
        }
    )


QUICK = SearchSettings(budgets=("w8_fraction=0.2",), blocks=2, block_size=32, trials=4)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def divergence() -> Divergence:
    made = recipe()
    model = load_model(made.model).requires_grad_(False)
    groups = find_groups(model, made.quantization.skip)
    assert made.quantization.activations is not None
    switching = SwitchingModel(
        model, groups, parse_candidates(["8", "2"], made), made.quantization.activations.scheme
    )
    text = torch.randint(0, 384, (3, 32), generator=torch.Generator().manual_seed(1))
    return Divergence(switching, text)


def test_groups_are_the_kernels_that_serve_them() -> None:
    model = load_model(recipe().model)
    groups = find_groups(model, ("lm_head",))
    assert [group.name.removeprefix("model.layers.0.") for group in groups[:4]] == [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    ]  # fmt: skip
    assert groups[0].layers == tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    assert {group.block for group in groups} == {0, 1}
    alone = find_groups(model, ("lm_head",), fused=False)
    assert len(alone) == 14
    assert sum(g.weights for g in alone) == sum(g.weights for g in groups)


@given(
    data=st.data(),
    groups=st.integers(1, 5),
    candidates=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_program_finds_what_trying_everything_finds(
    data: st.DataObject, groups: int, candidates: int
) -> None:
    numbers = st.floats(-5, 5).map(lambda value: round(value, 3))
    draw = lambda: np.array(  # noqa: E731
        data.draw(st.lists(st.lists(numbers, min_size=candidates, max_size=candidates), min_size=groups,
                           max_size=groups)))  # fmt: skip
    costs, usage = draw(), np.abs(draw())
    least, most = usage.min(axis=1).sum(), usage.max(axis=1).sum()
    limit = least + data.draw(st.floats(0, 1)) * (most - least) + 1e-6
    budget = Budget("average_bits", limit, usage, 0.0, limit)
    everything = [
        sum(costs[i, c] for i, c in enumerate(choice))
        for choice in itertools.product(range(candidates), repeat=groups)
        if budget.used(choice) <= limit
    ]
    found = solve(costs, [budget])
    assert budget.used(found) <= limit + 1e-5
    assert sum(costs[i, c] for i, c in enumerate(found)) <= min(everything) + 1e-5


def test_frontier_never_gets_worse_with_more_room() -> None:
    generator = np.random.default_rng(0)
    costs = np.stack([np.zeros(12), -generator.random(12)], axis=1)
    usage = np.stack([np.zeros(12), generator.random(12)], axis=1)
    front = frontier(costs, Budget("average_bits", 2.0, usage, 0.0, 2.0), points=7)
    totals = [costs[np.arange(12), choice].sum() for _, choice in front]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 0


def test_pareto_keeps_what_nothing_beats() -> None:
    assert pareto([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)]) == [0, 1, 4]


def test_budgets_count_scales_and_the_rest_of_the_model() -> None:
    made = recipe()
    groups = find_groups(load_model(made.model), ("lm_head",))
    candidates = parse_candidates(["8", "4:g32"], made)
    total = sum(group.weights for group in groups)
    rows = sum(shape[0] for group in groups for shape in group.shapes)
    all_four = [0] * len(groups)
    average = make_budget("average_bits=9", groups, candidates, 0)
    assert average.used(all_four) == pytest.approx(4 + 32 * rows / total)
    by_group = [2] * len(groups)
    assert average.used(by_group) == pytest.approx(4 + 32 / 32)
    size = make_budget("size_gb=1", groups, candidates, other_weights=1000)
    assert size.used(all_four) * 8e9 == pytest.approx(4 * total + 32 * rows + 16_000)
    eight = make_budget("w8_fraction=1", groups, candidates, 0)
    assert eight.used([1] * len(groups)) == pytest.approx(1)
    assert eight.used(all_four) == 0


def test_latency_table_bounds_the_time_of_a_token(tmp_path: Path) -> None:
    made = recipe()
    groups = find_groups(load_model(made.model), ("lm_head",))
    candidates = parse_candidates(["8"], made)
    shapes = {f"{n}x{k}" for group in groups for n, k in group.shapes}
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"other_ms": 2.0, "ms": {shape: {"4": 0.5, "8": 1.0} for shape in shapes}}))
    layers = sum(len(group.layers) for group in groups)
    budget = make_budget("tokens_per_second=100", groups, candidates, 0, table)
    assert budget.shown([0] * len(groups)) == pytest.approx(1000 / (2 + 0.5 * layers))
    with pytest.raises(UserError, match="the most is 111"):
        make_budget("tokens_per_second=200", groups, candidates, 0, table)
    table.write_text(json.dumps({"other_ms": 2.0, "ms": {}}))
    with pytest.raises(UserError, match="no entry for a 64x64 layer"):
        make_budget("tokens_per_second=100", groups, candidates, 0, table)


def test_divergence_of_the_full_model_is_zero_and_of_fewer_bits_larger(divergence: Divergence) -> None:
    count = len(divergence.switching.groups)
    full, eight = divergence.measure([-1] * count), divergence.measure([1] * count)
    four, two = divergence.measure([0] * count), divergence.measure([2] * count)
    # The head is multiplied in bf16 where the processor does that.
    assert full == pytest.approx(0, abs=5e-4)
    assert full <= eight < four < two


def test_starting_at_a_later_block_gives_the_same_number(divergence: Divergence) -> None:
    count = len(divergence.switching.groups)
    base = [0] * count
    divergence.set_reference(base)
    for group in range(count):
        choice = list(base)
        choice[group] = 1
        near = divergence.measure(choice)
        divergence.reference = None
        whole = divergence.measure(choice)
        divergence.set_reference(base)
        assert near == pytest.approx(whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("integer", [True, False])
def test_switching_model_is_the_prepared_model(divergence: Divergence, integer: bool) -> None:
    """What the search measures is what `prepare` gives with the same grids, in integers and with gradients."""
    count = len(divergence.switching.groups)
    divergence.switching.set([0] * count)
    model = load_model(recipe().model).eval()
    prepare(model, recipe().quantization)
    for layer in model.modules():
        if hasattr(layer, "integer_forward"):
            layer.integer_forward = "auto" if integer else "fake"
    with torch.set_grad_enabled(not integer):
        ours = divergence.model(divergence.text).logits
        theirs = model(divergence.text).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_estimates_agree_that_fewer_bits_hurt_more(divergence: Divergence) -> None:
    for costs in (fisher_costs(divergence), hessian_costs(divergence, samples=2)):
        assert (costs >= 0).all()
        eight, four, two = costs[:, 1].sum(), costs[:, 0].sum(), costs[:, 2].sum()
        assert eight < four < two
    slope = slope_costs(divergence, [0] * len(divergence.switching.groups))
    assert (slope[:, 0] == 0).all()


def test_fisher_predicts_the_divergence_of_a_small_change(divergence: Divergence) -> None:
    """To second order the divergence is half the Fisher-weighted error; sampling and cross terms remain."""
    count = len(divergence.switching.groups)
    weight_only = divergence.switching.activations
    divergence.switching.activations = None
    try:
        measured = divergence.measure([1] * count)
    finally:
        divergence.switching.activations = weight_only
    predicted = fisher_costs(divergence)[:, 1].sum()
    assert measured / 4 < predicted < measured * 4


def test_search_stays_within_its_budget_and_beats_the_plain_grid(tmp_path: Path) -> None:
    made = recipe()
    result = search(made, QUICK, tmp_path, QUIET)
    used = result.budgets[0].used(result.choice)
    assert 0 < used <= 0.2
    assert result.divergence < result.reference_divergence
    write_result(result, made, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["reached"]["w8_fraction"] == pytest.approx(used)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert (tmp_path / "layers.md").read_text().count("\n") == len(result.groups) + 2


def test_overrides_go_into_a_recipe_and_give_those_grids(tmp_path: Path) -> None:
    made = recipe()
    result = search(made, QUICK, tmp_path, QUIET)
    write_result(result, made, tmp_path)
    body = yaml.safe_load((tmp_path / "overrides.yaml").read_text())
    merged = Recipe.model_validate(made.model_dump(mode="json") | {
        "quantization": made.quantization.model_dump(mode="json") | body["quantization"]
    })  # fmt: skip
    grids = layer_grids(load_model(merged.model), merged.quantization)
    eight = {name for name, grid in grids.items() if grid.weights is not None and grid.weights.bits == 8}
    wanted = {
        layer
        for group, choice in zip(result.groups, result.choice, strict=True)
        if choice
        for layer in group.layers
    }
    assert eight == wanted
    (tmp_path / "recipe.yaml").write_text(
        "extends: [base.yaml, overrides.yaml]\nname: mixed\n", encoding="utf-8"
    )
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    assert len(load_recipe(tmp_path / "recipe.yaml").quantization.overrides) == len(overrides(result))


def test_search_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(recipe(), QUICK, tmp_path / "whole", QUIET)
    calls = 0
    measure = Divergence.measure

    def killed(self: Divergence, choice: list[int]) -> float:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return measure(self, choice)

    monkeypatch.setattr(Divergence, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        search(recipe(), QUICK, tmp_path / "cut", QUIET)
    stored = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert len(stored["changes"]) == 4
    monkeypatch.setattr(Divergence, "measure", measure)
    second = search(recipe(), QUICK, tmp_path / "cut", QUIET)
    assert second.choice == first.choice
    assert second.divergence == pytest.approx(first.divergence, rel=1e-6)
    calls = -100
    monkeypatch.setattr(Divergence, "measure", killed)
    search(recipe(), QUICK, tmp_path / "cut", QUIET)
    assert calls == -100, "a finished search measures nothing again"


def test_another_question_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    search(recipe(), QUICK, tmp_path, QUIET)
    with pytest.raises(UserError, match="another candidates"):
        search(recipe(weights={"bits": 3}), QUICK, tmp_path, QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a search needs a budget"),
        (["--budget", "bits=4"], "--budget 'bits=4' is not one of average_bits"),
        (["--budget", "average_bits=-4"], "the value must be positive"),
        (["--budget", "average_bits=four"], "'four' is not a number"),
        (["--budget", "w8_fraction=5"], "a fraction is at most 1"),
        (["--budget", "average_bits=1"], "cannot be met: with these candidates the least is"),
        (["--budget", "tokens_per_second=5"], "needs --latency FILE"),
        (["--budget", "w8_fraction=0.1", "--candidates", "5"], "candidate '5': bits=5.0 is not one of"),
        (["--budget", "w8_fraction=0.1", "--candidates", "eight"], "is not BITS or BITS:GRANULARITY"),
        (
            ["--budget", "w8_fraction=0.1", "quantization.weights=null", "ptq.methods=[rtn]", "export=[]"],
            "quantization.weights is null",
        ),
        (["--budget", "w8_fraction=0.1", "--measures", "guess"], "--measures 'guess' is not one of fisher"),
        (["--budget", "w8_fraction=0.1", "--blocks", "0"], "--blocks 0 must be positive"),
    ],
)
def test_impossible_searches_get_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    base = ["search", "smollm2-135m-w4a8", "model.source=random:tiny", "--folder", str(tmp_path / "s")]
    result = CliRunner().invoke(app, [*base, *arguments])
    assert isinstance(result.exception, UserError), result.exception
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "s").exists()


def test_learned_bits_keep_the_budget_and_are_measured_beside_the_others(tmp_path: Path) -> None:
    settings_with = replace(QUICK, measures=("fisher", "learned"), learning_steps=6)
    result = search(recipe(), settings_with, tmp_path, QUIET)
    assert set(result.rivals) == {"divergence", "slope", "fisher", "learned", "second round", "both rounds"}
    learned = result.estimates["learned"]
    # At first all other grids together have the budget's share.
    np.testing.assert_allclose(np.exp(-learned) @ [0.8, 0.2], 1, rtol=1e-5)
    assert min(result.rivals.values()) < result.reference_divergence


def test_learning_prefers_the_better_grid_where_the_budget_allows(divergence: Divergence) -> None:
    groups, candidates = divergence.switching.groups, divergence.switching.candidates
    roomy = make_budget("average_bits=12", groups, candidates, 0)
    growth = np.exp(-learned_costs(divergence, [2] * len(groups), [roomy], steps=12))
    assert growth[:, 2].mean() < 0.9, "2 bits must lose of their share"
    tight = make_budget("average_bits=3.6", groups, candidates, 0)
    held = np.exp(-learned_costs(divergence, [2] * len(groups), [tight], steps=12))
    assert held[:, 2].mean() > growth[:, 2].mean()


def test_finals_are_decided_on_other_text_and_hold_every_programs_answer(tmp_path: Path) -> None:
    """Whatever looks best on the searched text, the best on the other text is taken."""
    result = search(recipe(), QUICK, tmp_path, QUIET)
    origins = [finalist.origin for finalist in result.finals]
    assert "divergence" in origins
    judged = [finalist.judged for finalist in result.finals]
    assert judged == sorted(judged)
    assert (result.choice, result.judged) == (result.finals[0].choice, judged[0])
    assert all(result.budgets[0].used(finalist.choice) <= 0.2 for finalist in result.finals)
    stored = json.loads((tmp_path / "state.json").read_text())
    assert ",".join(map(str, result.reference)) in stored["judgements"]


def test_an_assignment_that_suits_the_searched_text_by_luck_does_not_win(
    divergence: Divergence, tmp_path: Path
) -> None:
    count = len(divergence.switching.groups)
    lucky, good = [2, *[0] * (count - 1)], [1, *[0] * (count - 1)]
    state = SearchState(tmp_path, {})
    state.remember(lucky, 0.0)
    state.remember(good, 1.0)
    entries = finalists({"slope": good}, state, [])
    assert entries == [("slope", good), ("refined", lucky)]
    assert [finalist.choice for finalist in judge(divergence, entries, state)] == [good, lucky]
    assert len(judge(divergence, entries, SearchState(tmp_path, {}), -np.inf)) == 1, "the first in any case"


def test_judging_text_is_other_text_where_there_is_any() -> None:
    train = torch.arange(100).reshape(10, 10)
    assert judging_text(train, 2).tolist() == train[2:10].tolist()
    assert judging_text(train, 10).tolist() == train.tolist()


def test_second_round_sees_that_gains_overlap(divergence: Divergence, tmp_path: Path) -> None:
    count = len(divergence.switching.groups)
    costs = np.zeros((count, 3))
    state = SearchState(tmp_path, {})
    planned = [1, *[0] * (count - 1)]
    around = second_round(divergence, costs, planned, state, np.inf)
    assert (around[np.arange(count), planned] == 0).all()
    whole = divergence.measure([1, 1, *planned[2:]]) - divergence.measure(planned)
    assert around[1, 1] == pytest.approx(whole, abs=1e-6)
    assert second_round(divergence, costs, planned, SearchState(tmp_path, {}), -np.inf).sum() == 0


def test_overrides_in_the_recipe_are_refused(tmp_path: Path) -> None:
    with_overrides = recipe(overrides=[{"match": "*down_proj", "weights": {"bits": 8}}])
    with pytest.raises(UserError, match=r"quantization\.overrides is set"):
        search(with_overrides, QUICK, tmp_path, QUIET)
