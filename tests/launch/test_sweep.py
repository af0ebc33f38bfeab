"""Sweeps: combinations, names, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatapult.launch.sweep import load_sweep, recipes
from qatapult.trainer.recipe.errors import UserError

SWEEP = """
name: bits
recipe: tiny-random-w4a8
at_once: 2
overrides: [qat.tokens=5120, "export=[]"]
parameters:
  quantization.weights.bits: [4, 3]
  qat.method: [lsq, minmax]
exclude:
  - {quantization.weights.bits: 3, qat.method: minmax}
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    return file


def test_every_combination_but_the_excluded_is_a_run(tmp_path: Path) -> None:
    file = write(tmp_path, SWEEP)
    made = recipes(load_sweep(file), file, ("seed=3",))
    assert [r.name for r in made] == [
        "bits-000-bits4-methodlsq",
        "bits-001-bits4-methodminmax",
        "bits-002-bits3-methodlsq",
    ]
    assert [(r.quantization.weights and r.quantization.weights.bits, r.qat.method) for r in made] == [
        (4, "lsq"),
        (4, "minmax"),
        (3, "lsq"),
    ]
    assert {(r.qat.tokens, r.seed) for r in made} == {(5120, 3)}


def test_whole_sections_may_vary_and_names_stay_folder_names(tmp_path: Path) -> None:
    values = "[{bits: 4, granularity: group, group_size: 32}, {bits: 8}]"
    file = write(
        tmp_path, f"name: s\nrecipe: tiny-random-w4a8\nparameters: {{quantization.weights: {values}}}\n"
    )
    made = recipes(load_sweep(file), file)
    assert [r.quantization.weights and r.quantization.weights.bits for r in made] == [4, 8]
    assert len({r.name for r in made}) == 2


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("at_once", "at_one", "did you mean 'at_once'?"),
        ("[4, 3]", "[]", "has no values"),
        ("[4, 3]", "[99]", "bits"),
        ("qat.method", "qat.metod", "did you mean 'method'?"),
        ("name: bits", "name: '$(touch x)'", "name"),
        ("recipe: tiny", "recipe: tinny", "did you mean 'tiny-random-w4a8'?"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    file = write(tmp_path, SWEEP.replace(old, new))
    with pytest.raises(UserError) as refusal:
        recipes(load_sweep(file), file)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
