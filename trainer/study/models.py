"""The models that studies train from scratch: how, and where they are kept. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.study.schema import Pretraining, Study

# Blocks a step. Small models learn more from many steps than from large batches: at 300 k tokens the loss of
# the 0.85 M model was 1.9 nats a byte with four blocks of 256 and 2.2 at 400 k tokens with eight.
_BLOCKS_A_STEP = 4
# Evaluations of which the best is kept.
_EVALUATIONS = 4


def model_folder(study: Study, size: str, runs: Path, model: str) -> Path:
    """Where a model that the study trains from scratch is kept.

    Its name says what it was trained on and how, so that studies in one folder of runs share it.
    """
    settings = study.models[model]
    data = training_recipe(study, size, settings).data.model_dump(mode="json", exclude_defaults=True)
    described = json.dumps(
        [settings.shape, settings.learning_rate, pretraining_tokens(study, size, settings), data],
        sort_keys=True,
    )
    return runs / "models" / hashlib.sha256(described.encode()).hexdigest()[:12]


def pretraining_tokens(study: Study, size: str, settings: Pretraining) -> int:
    """Length of a model's training in this size of the study."""
    return max(1, round(settings.tokens * study.size(size).pretraining_share))


def training_recipe(study: Study, size: str, settings: Pretraining) -> Recipe:
    """The study's recipe, turned into one for plain training of all weights on the text."""
    tokens = pretraining_tokens(study, size, settings)
    own = [
        f"name={study.name}-pretraining",
        "model.source=random:tiny",
        f"qat.tokens={tokens}",
        f"qat.batch_size={_BLOCKS_A_STEP}",
        "qat.global_batch_tokens=null",
        f"qat.evaluate_every_tokens={max(1, tokens // _EVALUATIONS)}",
        "qat.precision=fp32",
        "qat.trainable=all",
        "qat.blockwise_tokens=0",
        "qat.distillation.kind=none",
        f"qat.optimizer.learning_rate={settings.learning_rate}",
        "qat.optimizer.weight_decay=0.1",
    ]
    return load_recipe(study.recipe, [*study.overrides, *study.size(size).overrides, *own])
