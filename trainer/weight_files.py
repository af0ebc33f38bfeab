"""A checkpoint's tensors where they lie: one file or many, read by name and never all at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from qatapult.trainer.models import load_model, local_source
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Model

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Which safetensors file holds which tensor.

    Attributes:
        source: what people know the checkpoint by.
        files: by the tensors' names.
    """

    source: str
    files: dict[str, Path]

    @classmethod
    def single(cls, file: Path) -> WeightFiles:
        """All tensors of one file."""
        with safe_open(file, framework="pt") as opened:
            return cls(str(file), dict.fromkeys(opened.keys(), file))

    @classmethod
    def of(cls, model: Model, scratch: Path) -> WeightFiles:
        """The files of a recipe's model.

        Args:
            model: the checkpoint; random weights are drawn and written first.
            scratch: where that goes.

        Raises:
            UserError: if the checkpoint has no safetensors.
        """
        if model.source.startswith("random:"):
            load_model(model).save_pretrained(scratch)
            return cls._folder(scratch, model.source)
        local = local_source(model)
        folder = Path(local) if Path(local).is_dir() else _from_hub(str(local), model.revision)
        return cls._folder(folder, model.source)

    @classmethod
    def _folder(cls, folder: Path, source: str) -> WeightFiles:
        if (folder / _INDEX).exists():
            names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return cls(source, {name: folder / file for name, file in names.items()})
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise UserError(
                f"model.source {source!r} has no safetensors to read block by block; set "
                "qat.blockwise_offload=false"
            )
        parts = [cls.single(file).files for file in found]
        return cls(source, {name: file for part in parts for name, file in part.items()})

    def read(self, prefix: str, names: list[str]) -> dict[str, Tensor]:
        """Tensors of a module.

        Args:
            prefix: the module's qualified name.
            names: of the tensors within the module.

        Raises:
            UserError: if a tensor is not there.
        """
        tensors = {}
        for name in names:
            full = f"{prefix}.{name}"
            if full not in self.files:
                raise UserError(f"{self.source}: holds no tensor {full!r}; set qat.blockwise_offload=false")
            with safe_open(self.files[full], framework="pt") as opened:
                tensors[name] = opened.get_tensor(full)
        return tensors


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
