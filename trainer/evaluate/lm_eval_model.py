"""Any model of a run behind lm-eval's interface: full precision, PTQ, fake-quantized, or packed integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register_model("qatapult")
class QatapultLM(HFLM):
    """lm-eval's transformers model on a model that is in memory, or loaded from a run's folder.

    Args:
        run: a run's folder, or a Hugging Face folder; not with `pretrained`.
        model: which of the run's models: `full_precision`, `ptq`, `qat` or `packed`.
        pretrained: a model in memory instead.
        tokenizer: of the model in memory.
        batch_size: requests at a time.
        more: as for lm-eval's own `hf`.
    """

    def __init__(
        self,
        run: str | None = None,
        model: str = "packed",
        pretrained: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        **more: Any,
    ) -> None:
        if pretrained is None:
            from qatapult.trainer.evaluate.models import open_models

            if run is None:
                raise ValueError("give run=FOLDER or a model in memory")
            models = open_models(Path(run))
            pretrained, tokenizer = models.load(model), models.tokenizer
        more.pop("device", None)  # the model is where it is
        more.pop("max_batch_size", None)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, **more)
