"""Recipes: extends, overrides, shipped ones, and messages that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import differences, dump_recipe, load_recipe, shipped_recipes


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_whole(name: str) -> None:
    assert load_recipe(name).name == name


def test_extends_and_overrides_win_in_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        "base.yaml",
        "name: base\nmodel: {source: 'random:tiny'}\nqat: {tokens: 1000, batch_size: 4}\n",
    )
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nname: child\nqat: {tokens: 2000}\n")
    recipe = load_recipe(child, ["qat.optimizer.learning_rate=3e-4"])
    assert (recipe.name, recipe.qat.tokens, recipe.qat.batch_size) == ("child", 2000, 4)
    assert recipe.qat.optimizer.learning_rate == pytest.approx(3e-4)


def test_a_dumped_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe("smollm2-135m-w4a8")
    assert load_recipe(write(tmp_path, "again.yaml", dump_recipe(recipe))) == recipe


def test_differences_name_the_fields() -> None:
    old, new = load_recipe("smollm2-135m-w4a8"), load_recipe("smollm2-135m-w4a8", ["qat.tokens=5", "seed=1"])
    assert differences(old, new) == ["seed: 0 → 1", f"qat.tokens: {old.qat.tokens} → 5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "field 'model' is missing"),
        ("name: x\nmodel: {sauce: y}", "unknown field 'model.sauce'; did you mean 'source'?"),
        ("name: x\nmodel: {source: y}\nqat: {tokens: -1}", "qat.tokens"),
        ("name: x\nmodel: {source: y}\nqat: {method: magic}", "qat.method"),
        ("- a list", "mapping"),
        ("name: [unclosed", "not valid YAML"),
        ("extends: loop.yaml\nname: x", "circle"),
        (
            "name: x\nmodel: {source: y}\nquantization: {activations: {bits: 8, granularity: channel}}",
            "use 'token'",
        ),
        (
            "name: x\nmodel: {source: y}\nqat: {schedule: {phases: [{weights: {bits: 8}, fraction: 0.5}]}}",
            "add up to 1",
        ),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, "loop.yaml", text)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_recipe_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-w4a8'"):
        load_recipe("smollm2-135m-w4a9")
