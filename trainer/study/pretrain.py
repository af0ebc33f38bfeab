"""Train a small LLaMA from scratch on the study's text: the full-precision model of a cell.

Run as `python -m qatapult.trainer.study.pretrain STUDY.json SIZE MODEL RUNS`, in a process of its own because
an Accelerator's settings hold for a whole process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.data.byte_tokenizer import byte_tokenizer
from qatapult.trainer.loop.engine import create_accelerator
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.study.models import model_folder, training_recipe
from qatapult.trainer.study.schema import Study


def pretrain(study: Study, size: str, name: str, runs: Path) -> None:
    """Train one of the study's models and save it, with its tokenizer, as a Hugging Face folder.

    It reads bytes, so that models of a few hundred thousand parameters do not consist of embeddings only.

    Args:
        study: the study.
        size: `small` or `full`.
        name: of the model in `study.models`.
        runs: folder of the runs.
    """
    settings, tokenizer = study.models[name], byte_tokenizer()
    recipe = training_recipe(study, size, settings)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        config = AutoConfig.for_model("llama", **{"vocab_size": len(tokenizer), **settings.shape})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    accelerator, console = create_accelerator(recipe), Console()
    target = model_folder(study, size, runs, name)
    folder = target.parent / "pretraining" / target.name
    data = load_data(recipe, tokenizer)
    trainer = Trainer(
        accelerator, recipe, model.to(accelerator.device), None, data, folder, MetricsLog(None), console
    )
    trainer.train()
    trainer.load_best()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.say(f"model {name}: {parameters:,} parameters, perplexity a byte {trainer.evaluate().value:.3f}")
    if accelerator.is_main_process:
        building = target.with_name(f".{name}.building")
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        building.rename(target)


if __name__ == "__main__":
    described, wanted_size, wanted_name, runs_folder = sys.argv[1:]
    parsed = Study.model_validate_json(Path(described).read_text(encoding="utf-8"))
    pretrain(parsed, wanted_size, wanted_name, Path(runs_folder))
