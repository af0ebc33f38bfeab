"""The batches of the coming steps, read by a thread while the current step computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from qatapult.trainer.data.packing import Blocks
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.loop.batches import BatchPlan

# Steps that are read ahead. One would do for a steady disk; the second rides out a slow read.
_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes:
        indices: of the blocks, int64 `[B]`, on the CPU; −1 stands for no block.
        ids: token ids, int64 `[B, S]`.
        present: bool `[B]`, False where there is no block.
        signal: what a cached teacher says, or None.
    """

    indices: Tensor
    ids: Tensor
    present: Tensor
    signal: TeacherSignal | None = None


class Loader:
    """Gives any step's batches, and has the next ones ready.

    Which blocks a step has follows from its number (`BatchPlan`), so a run that resumes or rolls back asks for another
    number and nothing else: there is no position to restore.

    Args:
        plan: which blocks each step has.
        blocks: the training text.
        device: where batches go.
        signal: reads a cached teacher's answer, by token ids and block numbers; None without such a cache.
    """

    def __init__(
        self,
        plan: BatchPlan,
        blocks: Blocks,
        device: torch.device,
        signal: Callable[[Tensor, Tensor], TeacherSignal] | None = None,
    ) -> None:
        self._plan, self._blocks, self._device, self._signal = plan, blocks, device, signal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._coming: dict[int, Future[list[Batch]]] = {}

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a step, the next ones being read meanwhile.

        Args:
            number: of the step, from 0.

        Raises:
            Exception: whatever reading raised.
        """
        window = range(number, number + _AHEAD + 1)
        self._coming = {step: future for step, future in self._coming.items() if step in window}
        for step in window:
            if step not in self._coming:
                self._coming[step] = self._thread.submit(self._read, step)
        return self._coming.pop(number).result()

    def close(self) -> None:
        """Forget what was read ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[Batch]:
        return [self._batch(indices) for indices in self._plan.step(step)]

    def _batch(self, indices: Tensor) -> Batch:
        ids = self._move(self._blocks[indices.clamp(min=0)])
        signal = None if self._signal is None else self._signal(ids, indices)
        return Batch(indices, ids, self._move(indices >= 0), signal)

    def _move(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)
