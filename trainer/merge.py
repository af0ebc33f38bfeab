"""A Hugging Face folder out of a checkpoint, whichever engine and however many processes wrote it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from qatapult.trainer.loop.checkpoint import read_weights, verify_checkpoint
from qatapult.trainer.models import empty_model, load_tokenizer
from qatapult.trainer.quantize import lora
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder


def merge_checkpoint(checkpoint: Path, out: Path) -> tuple[int, int]:
    """Write config, tokenizer, `model.safetensors` (the model's own tensors) and `scales.safetensors` (the rest).

    Args:
        checkpoint: `runs/<name>/checkpoints/step-<n>`; the run's recipe says which model it is of.
        out: the folder; it must not exist.

    Returns:
        Numbers of tensors in the two files.

    Raises:
        UserError: if a file is damaged, there is no recipe, or the folder exists.
    """
    if out.exists():
        raise UserError(f"--out {out} exists; name a folder that does not")
    recipe_file = RunFolder(checkpoint.resolve().parents[1]).recipe
    if not recipe_file.exists():
        raise UserError(
            f"{checkpoint} lies in no run: {recipe_file} is missing, which says what model this is"
        )
    verify_checkpoint(checkpoint)
    recipe = load_recipe(str(recipe_file), [])
    model = empty_model(recipe.model)
    tensors = lora.merged(read_weights(checkpoint))
    own = set(model.state_dict())
    weights = {name: tensor for name, tensor in tensors.items() if name in own}
    # A rotated model's head is its own, whatever the config of the source says.
    head = next((name for name in weights if name.startswith("lm_head.")), None)
    model.config.tie_word_embeddings = bool(model.config.tie_word_embeddings) and head is None
    scales = {name: tensor for name, tensor in tensors.items() if name not in weights}
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.config.save_pretrained(building)
        model.generation_config.save_pretrained(building)
        load_tokenizer(recipe.model).save_pretrained(building)
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        save_file(scales, building / "scales.safetensors", metadata={"format": "pt"})
        os.chmod(building, 0o755)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return len(weights), len(scales)
