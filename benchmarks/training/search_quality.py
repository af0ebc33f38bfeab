"""Held-out perplexity of a search's assignment against random ones and hand rules of the same budget.

    qatapult search smollm2-135m-w4a8 --budget w8_fraction=0.05
    python benchmarks/training/search_quality.py RECIPE searches/RECIPE [BLOCKS [RANDOM]]

Everything is post-training, round-to-nearest. Hand rules put attention, or down projections, of some blocks
on the candidate with the most bits: of the first, the last, or evenly spread blocks, while the budget lasts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.evaluate.perplexity import perplexity
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.search.budget import Budget, make_budget
from qatapult.trainer.search.candidates import parse_candidates
from qatapult.trainer.search.groups import Group, find_groups
from qatapult.trainer.search.program import solve
from qatapult.trainer.search.switching import FULL_PRECISION, SwitchingModel


def fill(order: Sequence[int], budget: Budget, groups: int, most: int) -> list[int]:
    """Raise groups in this order while they fit the budget."""
    choice = [0] * groups
    for group in order:
        raised = [*choice[:group], most, *choice[group + 1 :]]
        if budget.used(raised) <= budget.limit * (1 + 1e-9):
            choice = raised
    return choice


def hand_rule(groups: Sequence[Group], kinds: tuple[str, ...], rank: Callable[[int], float]) -> list[int]:
    """Groups of some kinds, block by block in an order of the blocks."""
    mine = [i for i, group in enumerate(groups) if group.name.rpartition(".")[2] in kinds]
    return sorted(mine, key=lambda i: (rank(groups[i].block or 0), i))


def main() -> None:
    recipe, folder = load_recipe(sys.argv[1]), Path(sys.argv[2])
    blocks, randoms = (int(value) for value in [*sys.argv[3:5], *("4", "20")[len(sys.argv) - 3 :]])
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    names = list(next(iter(found["costs"].values())))
    candidates = parse_candidates(names[1:], recipe)
    model = load_model(recipe.model).requires_grad_(False)
    groups = find_groups(model, recipe.quantization.skip)
    others = sum(p.numel() for p in model.parameters()) - sum(group.weights for group in groups)
    ((kind, value),) = found["budgets"].items()
    budget = make_budget(f"{kind}={value}", groups, candidates, others)
    most = max(range(len(candidates)), key=lambda j: candidates[j].scheme.bits)
    data = load_data(recipe, load_tokenizer(recipe.model))
    text, owners = data.held_out[:blocks], data.held_out_documents[:blocks]
    activations = recipe.quantization.activations
    switching = SwitchingModel(model, groups, candidates, activations.scheme if activations else None)

    def measure(choice: Sequence[int]) -> float:
        switching.set(choice)
        with torch.no_grad():
            return perplexity(model, text, owners).value

    count, depth = len(groups), max(group.block or 0 for group in groups)
    index = {candidate.name: j for j, candidate in enumerate(candidates)}
    chosen = [index[found["assignment"][group.name]] for group in groups]
    attention, down = ("qkv_proj", "o_proj"), ("down_proj",)
    spread = [i / 4 % 1 for i in range(depth + 1)]
    rules = {
        "full precision": [FULL_PRECISION] * count,
        "all on the recipe's grid": [0] * count,
        "search": chosen,
        "attention, first blocks": fill(hand_rule(groups, attention, float), budget, count, most),
        "attention, last blocks": fill(hand_rule(groups, attention, lambda b: -b), budget, count, most),
        "attention, spread": fill(hand_rule(groups, attention, lambda b: spread[b]), budget, count, most),
        "down projections, first blocks": fill(hand_rule(groups, down, float), budget, count, most),
        "down projections, last blocks": fill(hand_rule(groups, down, lambda b: -b), budget, count, most),
    }
    measured = {name: [row[c.name] for c in candidates] for name, row in found["costs"].items()}
    for name, costs in {"measured single changes": measured, **found["estimates"]}.items():
        table = np.array([costs[group.name] for group in groups])
        rules[f"integer program on {name} alone"] = solve(table, [budget])
    generator = np.random.default_rng(1)
    for number in range(randoms):
        order = generator.permutation(count).tolist()
        rules[f"random {number + 1}"] = fill(order, budget, count, most)
    print(f"{text.numel():,} held-out tokens, {kind} {value:g}\n")
    print(f"| assignment | {kind} | perplexity | seconds |\n|---|---:|---:|---:|", flush=True)
    random_values = []
    for name, choice in rules.items():
        started = time.perf_counter()
        result = measure(choice)
        seconds = time.perf_counter() - started
        used = budget.used([max(part, 0) for part in choice])
        print(f"| {name} | {used:.4f} | {result:.2f} | {seconds:.0f} |", flush=True)
        if name.startswith("random"):
            random_values.append(result)
    if random_values:
        print(f"\nrandom: best {min(random_values):.2f}, median {float(np.median(random_values)):.2f}")


if __name__ == "__main__":
    main()
