"""One of two processes that share a teacher under FSDP2: writes how much of it the process holds at each layer.

Run by `test_engines.py` under torchrun; not a test itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_worker import use_fsdp2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qatapult.trainer.distill.layers import decoder_layers
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.loop.engine import create_accelerator
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.shapes import RANDOM_SHAPES


def held(model: nn.Module) -> int:
    """Elements of parameters in this process's memory: shards, and what is gathered."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.numel() for tensor in local)


def main() -> None:
    use_fsdp2()
    accelerator = create_accelerator(load_recipe("tiny-random-w4a8"))
    shape = RANDOM_SHAPES["tiny"] | {"num_hidden_layers": 16, "vocab_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    whole = held(model)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected: Tensor = model.model(input_ids=ids).last_hidden_state
    teacher = InProcessTeacher(model, accelerator)
    shares: list[float] = []
    for layer in decoder_layers(teacher.model):
        layer.self_attn.register_forward_hook(lambda *_: shares.append(held(teacher.model) / whole))
    signal: TeacherSignal = teacher.signal(ids, torch.arange(2))
    torch.testing.assert_close(signal.hidden, expected)
    Path(sys.argv[1], f"shares-{accelerator.process_index}.json").write_text(json.dumps(shares))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
