"""Which blocks each process computes in each optimizer step.

Everything follows from the step's number, so a resumed run needs no more than that number, and any number of
processes computes the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPlan:
    """Global batches cut into micro-batches for one process.

    Attributes:
        blocks: blocks of training text.
        blocks_per_step: blocks of one optimizer step, all processes together.
        batch_size: blocks a process computes at a time.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
        shuffle: a new order in each pass, or the given one.
    """

    blocks: int
    blocks_per_step: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, the same on every process: collectives must match."""
        own = -(-self.blocks_per_step // self.world_size)
        return -(-own // self.batch_size)

    def step(self, step: int) -> list[Tensor]:
        """Indices of the blocks of one step on this process.

        Args:
            step: from 0.

        Returns:
            `micro_batches` tensors, int64 `[batch_size]`; −1 stands for no block (its tokens count as none).
        """
        wanted = range(step * self.blocks_per_step, (step + 1) * self.blocks_per_step)
        own = [self._block(position) for position in wanted][self.rank :: self.world_size]
        own += [-1] * (self.micro_batches * self.batch_size - len(own))
        return list(torch.tensor(own).split(self.batch_size))

    def _block(self, position: int) -> int:
        epoch, place = divmod(position, self.blocks)
        if not self.shuffle:
            return place
        return int(_order(self.blocks, self.seed, epoch)[place])


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(blocks, generator=generator)
