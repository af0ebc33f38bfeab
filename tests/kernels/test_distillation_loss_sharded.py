"""Heads that are sharded over processes, as FSDP2 leaves them between forward passes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qatapult.kernels import distillation_loss

RANKS = 2


def tensors(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads equal on all ranks, hidden states of their own."""
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(1 + rank)
    heads = [torch.randn(13, dim, generator=shared) for dim in (6, 4)]
    hidden = [torch.randn(5, dim, generator=own) for dim in (6, 4)]
    return hidden[0], heads[0], hidden[1], heads[1]


def work(rank: int, folder: str) -> None:
    """Loss and gradients of one rank, the gradient of the head as its shard."""
    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        student, head, teacher, teacher_head = tensors(rank)
        student.requires_grad_()
        sharded = distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()
        teacher_sharded = distribute_tensor(teacher_head, mesh, [Shard(0)])
        loss = distillation_loss(student, sharded, teacher, teacher_sharded)
        loss.backward()
        assert isinstance(sharded.grad, DTensor)
        result = {"loss": loss.detach(), "hidden": student.grad, "head": sharded.grad.full_tensor()}
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        destroy_process_group()


def test_sharded_heads_give_the_losses_of_whole_ones_and_the_mean_of_their_gradients(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    head_gradients = []
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for rank, result in enumerate(results):
        student, head, teacher, teacher_head = tensors(rank)
        loss = distillation_loss(student.requires_grad_(), head.requires_grad_(), teacher, teacher_head)
        loss.backward()
        assert student.grad is not None
        assert head.grad is not None
        torch.testing.assert_close(result["loss"], loss.detach())
        torch.testing.assert_close(result["hidden"], student.grad)
        head_gradients.append(head.grad)
    for result in results:
        torch.testing.assert_close(result["head"], sum(head_gradients) / RANKS)
