"""How a benchmark's processes are started on an engine: `accelerate launch` on GPUs, torchrun with gloo on a CPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qatapult.trainer.plan.accelerate_config import deepspeed_config, write_accelerate_config
from qatapult.trainer.plan.hardware import parse_cluster
from qatapult.trainer.plan.settings import Engine, Setting
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_json

ENGINES: tuple[Engine, ...] = ("ddp", "fsdp2", "zero2", "zero3")
_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def node(processes: int) -> str:
    """The cluster as `qatapult plan` names it."""
    if not torch.cuda.is_available():
        return f"{processes}xCPU"
    return f"{processes}x{'H200' if 'H200' in torch.cuda.get_device_name() else 'H100-80GB'}"


def launch(
    recipe: Recipe, setting: Setting, processes: int, worker: Sequence[str], folder: Path
) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a worker on an engine.

    Args:
        recipe: decides the precision.
        setting: the engine and how it is used.
        processes: one for each GPU.
        worker: the script and its arguments.
        folder: for the engine's configuration, which is the one that `qatapult plan --write` gives.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if processes == 1 and setting.engine in ("single", "ddp", "fsdp2"):
        return [sys.executable, *worker], environment
    if torch.cuda.is_available():
        config = folder / "accelerate.yaml"
        write_accelerate_config(config, recipe, parse_cluster(node(processes)), setting)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        return [*command, "--main_process_port", str(free_port()), *worker], environment
    if setting.engine.startswith("zero"):
        write_json(folder / "deepspeed.json", deepspeed_config(setting))
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "deepspeed.json"),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    elif setting.engine == "fsdp2":
        environment |= _FSDP
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*command, f"--master-port={free_port()}", *worker], environment


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
