"""The full-precision teacher in the same processes, sharded as the student is.

Under FSDP2 and ZeRO-3 each process holds its share of the teacher; a layer is gathered while it computes and let
go again. Only a copy of the output head is whole while the loss is computed. Under the other engines, where the student
is whole on every process too, so is the teacher.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatapult.trainer.distill.layers import LayerStates, Pairing, tapped
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.evaluate.perplexity import decoder, last_hidden


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
        accelerator: shards the model as its engine shards the student; None keeps it whole.
        pairing: layers that the student's are compared with.
    """

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator | None = None, pairing: Pairing | None = None
    ) -> None:
        self.pairing = pairing or Pairing()
        module = _TeacherModule(model.eval().requires_grad_(False), self.pairing)
        self.model = model
        self._forward: nn.Module = module if accelerator is None else _sharded(module, accelerator)

    @torch.no_grad()
    def signal(self, ids: Tensor, blocks: Tensor) -> TeacherSignal:
        """See `Teacher`."""
        hidden, head, layers = self._forward(ids)
        return TeacherSignal(hidden=hidden, head=head, pairing=self.pairing, layers=layers)


class _TeacherModule(nn.Module):
    """Hidden states and head in one forward pass, inside which sharded engines have gathered both."""

    def __init__(self, model: PreTrainedModel, pairing: Pairing) -> None:
        super().__init__()
        self.model = model
        self.taps = pairing.teacher
        self.copies_head = False

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, LayerStates]:
        head = self.model.get_output_embeddings().weight
        with tapped(self.model, self.taps) as layers:
            hidden = last_hidden(self.model, ids)
        return hidden, head.clone() if self.copies_head else head, layers


def _sharded(module: _TeacherModule, accelerator: Accelerator) -> nn.Module:
    if accelerator.distributed_type == DistributedType.FSDP:
        return _fsdp2(module)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and zero_stage(accelerator) == 3:
        return _zero3(module, accelerator)
    return module


def zero_stage(accelerator: Accelerator) -> int:
    """ZeRO stage of the engine; 0 for other engines."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


def _fsdp2(module: _TeacherModule) -> nn.Module:
    """Shard layer by layer (torch's FSDP2), the embeddings by themselves; the head is the root's."""
    from torch.distributed.fsdp import fully_shard

    module.copies_head = True  # the gathered head is let go when the forward pass ends
    for layer in decoder(module.model).get_submodule("layers").children():
        fully_shard(layer)
    if not module.model.config.tie_word_embeddings:
        fully_shard(module.model.get_input_embeddings())
    fully_shard(module, reshard_after_forward=True)
    return module


def _zero3(module: _TeacherModule, accelerator: Accelerator) -> nn.Module:
    """Shard by DeepSpeed's ZeRO-3 without an optimizer, as inference engines do."""
    import deepspeed

    head = module.model.get_output_embeddings().weight
    module.copies_head = True  # the gathered head is let go when the forward pass ends
    plugin = accelerator.state.deepspeed_plugin
    zero = {"stage": 3, **_offload(plugin.deepspeed_config)}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
    if head.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    deepspeed.zero.register_external_parameter(module, head)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def _offload(config: dict[str, Any]) -> dict[str, Any]:
    """The teacher's parameters lie where the student's do."""
    offload = config.get("zero_optimization", {}).get("offload_param")
    return {} if offload is None else {"offload_param": offload}
