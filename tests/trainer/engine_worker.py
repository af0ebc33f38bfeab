"""One process of an engine's test: trains the tiny model under the launcher's engine and prints its losses.

Run by `test_engines.py` under torchrun or `accelerate launch`; not a test itself. Beside the recipe's overrides it
takes accidents, with the steps (counted as they are tried) in which they happen: `stop=9` sends rank 0 a SIGTERM,
`nan=2,5` gives the last rank's last micro-batch a NaN loss, `hang=3` lets the last rank sleep.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.distill.layers import pair_layers
from qatapult.trainer.distill.student import TeacherSignal
from qatapult.trainer.distill.teacher import InProcessTeacher
from qatapult.trainer.loop.engine import create_accelerator, local_tensors
from qatapult.trainer.loop.interrupt import Interrupted
from qatapult.trainer.loop.metrics import MetricsLog
from qatapult.trainer.loop.training import Trainer
from qatapult.trainer.models import load_model, load_tokenizer
from qatapult.trainer.quantize.prepare import prepare
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder


def use_fsdp2() -> None:
    """Accelerate offers FSDP2 on accelerators only; told that the world is there, it shards on gloo as well."""
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def cause(accident: str, at: set[int], trainer: Trainer) -> None:
    """Let something happen in these steps, counted from 0 as they are tried."""
    teacher, plan, calls = trainer.teacher, trainer.plan, iter(range(1_000_000))
    assert isinstance(teacher, InProcessTeacher)
    original = teacher.signal

    def signal_with_accident(ids: torch.Tensor, blocks: torch.Tensor) -> TeacherSignal:
        said = original(ids, blocks)
        step, micro_batch = divmod(next(calls), plan.micro_batches)
        if step not in at or micro_batch != plan.micro_batches - 1:
            return said
        if accident == "stop" and plan.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        elif accident == "hang" and plan.rank == plan.world_size - 1:
            time.sleep(12)
        elif accident == "nan" and plan.rank == plan.world_size - 1:
            return replace(said, hidden=said.hidden * torch.nan)
        return said

    teacher.signal = signal_with_accident  # type: ignore[method-assign]


def main() -> None:
    folder, engine, *overrides = sys.argv[1:]
    accidents = [word for word in overrides if word.startswith(("stop=", "nan=", "hang="))]
    overrides = [word for word in overrides if word not in accidents]
    if engine == "fsdp2":
        use_fsdp2()
    recipe = load_recipe("tiny-random-w4a8", overrides)
    accelerator = create_accelerator(recipe)
    model = load_model(recipe.model).to(accelerator.device)
    prepare(model, recipe.quantization)
    run = RunFolder(Path(folder))
    full_precision = load_model(recipe.model).to(accelerator.device)
    whole = sum(parameter.numel() for parameter in full_precision.parameters())
    pairing = pair_layers(recipe.qat.distillation, model.config, full_precision.config)
    teacher = InProcessTeacher(full_precision, accelerator, pairing)
    trainer = Trainer(
        accelerator,
        recipe,
        model,
        teacher,
        load_data(recipe, load_tokenizer(recipe.model)),
        run.checkpoints,
        MetricsLog(run if accelerator.is_main_process else None),
        Console(quiet=True),
    )
    for accident in accidents:
        name, _, steps = accident.partition("=")
        cause(name, {int(step) for step in steps.split(",")}, trainer)
    try:
        state = trainer.train()
    except Interrupted:
        sys.exit(85)
    held_out = trainer.evaluate().value
    weights = accelerator.get_state_dict(trainer.student)
    if accelerator.is_main_process:
        scales = [
            float(t.double().sum()) for name, t in sorted(weights.items()) if name.endswith("weight_scale")
        ]
        held = sum(tensor.numel() for tensor in local_tensors(list(teacher.model.parameters())))
        result = {"engine": str(accelerator.distributed_type), "processes": accelerator.num_processes}
        result |= {"teacher_share": held / whole}
        (run.path / "result.json").write_text(
            json.dumps(result | {"steps": state.step, "perplexity": held_out, "scales": scales})
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
