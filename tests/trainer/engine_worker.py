"""One process of an engine's test: trains the tiny model under the launcher's engine and prints its losses.

Run by `test_engines.py` under torchrun or `accelerate launch`; not a test itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState

from qatapult.trainer.console import Console
from qatapult.trainer.data.blocks import load_data
from qatapult.trainer.distill.layers import pair_layers
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


def main() -> None:
    folder, engine, *overrides = sys.argv[1:]
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
