"""The full-precision teacher in the same processes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.evaluate.perplexity import last_hidden


class Teacher(Protocol):
    """Anything that can tell the student what to predict."""

    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """What the teacher says.

        Args:
            ids: token ids, int64 `[B, S]`.
            blocks: index of each training block, int64 `[B]`, by which caches find their entries.
        """


class InProcessTeacher:
    """A frozen model in this process.

    Args:
        model: full precision; put into evaluation mode and never trained.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """See `Teacher`."""
        return TeacherSignal(
            hidden=last_hidden(self.model, ids), head=self.model.get_output_embeddings().weight
        )
