"""The Accelerate config of a setting, as `accelerate launch --config_file` reads it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from qatapult.trainer.plan.hardware import Cluster
from qatapult.trainer.plan.memory import compute_bytes
from qatapult.trainer.plan.settings import Setting
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import write_atomically, write_json


def accelerate_config(
    recipe: Recipe, cluster: Cluster, setting: Setting, deepspeed_file: str = "deepspeed.json"
) -> dict[str, Any]:
    """Fields of the Accelerate config that runs a recipe in a setting on a cluster.

    Args:
        deepspeed_file: where `deepspeed_config` is written, for ZeRO.
    """
    bf16 = compute_bytes(recipe, cluster) == 2 and recipe.qat.precision != "fp16"
    mixed = "bf16" if bf16 else ("fp16" if recipe.qat.precision == "fp16" else "no")
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _distributed_type(setting, cluster),
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": mixed,
        "num_machines": cluster.nodes,
        "num_processes": cluster.world,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": cluster.gpu.is_cpu,
    }
    if setting.engine.startswith("zero"):
        config["deepspeed_config"] = {"deepspeed_config_file": deepspeed_file, "zero3_init_flag": False}
        if cluster.nodes > 1:
            config["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
        # Beside a DeepSpeed file Accelerate refuses both; the recipe decides the precision.
        for field in ("use_cpu", "mixed_precision"):
            config.pop(field)
    if setting.engine == "fsdp2":
        config["fsdp_config"] = _fsdp(setting)
    return config


def recipe_overrides(setting: Setting) -> list[str]:
    """What a setting asks of the recipe, as `key=value`."""
    return [
        f"qat.batch_size={setting.micro_batch}",
        f"qat.gradient_checkpointing={str(setting.checkpointing).lower()}",
    ]


def write_accelerate_config(path: Path, recipe: Recipe, cluster: Cluster, setting: Setting) -> None:
    """Write the config, headed by the command that uses it; for ZeRO, DeepSpeed's JSON goes beside it."""
    beside = path.with_suffix(".deepspeed.json")
    overrides = " ".join(recipe_overrides(setting))
    header = (
        f"# {cluster.describe()}, {setting.name}, written by `qatapult plan` for the recipe {recipe.name}.\n"
        f"# accelerate launch --config_file {path.name} -m qatapult.trainer RECIPE {overrides}\n"
    )
    if cluster.nodes > 1:
        header += "# On every node: --machine_rank N --main_process_ip HOST --main_process_port PORT\n"
    if setting.engine.startswith("zero"):
        write_json(beside, deepspeed_config(setting))
    body = yaml.safe_dump(accelerate_config(recipe, cluster, setting, str(beside)), sort_keys=True)
    write_atomically(path, header + body)


def _distributed_type(setting: Setting, cluster: Cluster) -> str:
    if setting.engine.startswith("zero"):
        return "DEEPSPEED"
    if setting.engine == "fsdp2":
        return "FSDP"
    if setting.engine == "ddp":
        return "MULTI_CPU" if cluster.gpu.is_cpu else "MULTI_GPU"
    return "NO"


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """The shipped DeepSpeed config of a ZeRO stage, with the setting's offloading."""
    stage = setting.engine.removeprefix("zero")
    shipped = files("qatapult.configs") / "deepspeed" / f"zero{stage}.json"
    config: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
    if setting.offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if setting.offload == "parameters":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    return config


def _fsdp(setting: Setting) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": setting.offload == "parameters",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        # Every process has read the model and laid it on its grids when the engine gets it.
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_activation_checkpointing": False,
    }
