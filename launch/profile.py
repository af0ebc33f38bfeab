"""Cluster profiles: everything that depends on the cluster and not on the run.

A profile is a YAML file. One that the user keeps in their own config folder wins over the shipped one of the
same name, and may start from another by `extends: NAME`.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import describe_validation_error

_MAX_EXTENDS = 10
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|_KEY$", re.IGNORECASE)
_SET_BY_LAUNCHER = re.compile(
    r"--(job-name|output|error|array|chdir|signal|requeue|no-requeue|open-mode|wrap|nodes|ntasks\S*|parsable|export)\b"
    r"|-[JoeaDNn]"
)

# One word of a `#SBATCH` line: what Slurm's names, sizes and constraint expressions are made of.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:&|()\[\]*+@=/-]+$", max_length=200)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]


class Container(BaseModel):
    """The image that the ranks run in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: Literal["pyxis", "apptainer"] = Field(description="`pyxis` (srun with enroot) or `apptainer`.")
    image: Line = Field(description="A .sqsh or .sif file, or what the runtime pulls from a registry.")
    mounts: tuple[Line, ...] = Field(
        (), description="FROM or FROM:TO; the run folder and the working directory always are mounted."
    )
    options: tuple[Line, ...] = Field((), description="Further options of the runtime, one word each.")


class ClusterProfile(BaseModel):
    """Where runs go: sizes of a node, Slurm's names, container, modules and environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field("", description="One line for people.")
    partition: Word | None = Field(None, description="Slurm partition; the cluster's default if absent.")
    account: Word | None = Field(None, description="Account to charge.")
    qos: Word | None = Field(None, description="Quality of service.")
    constraint: Word | None = Field(None, description="Node features, such as `a100&nvlink`.")
    reservation: Word | None = Field(None, description="Reservation to use.")
    exclusive: bool = Field(False, description="Whole nodes only.")
    time: Word = Field("04:00:00", description="Time limit of one attempt; a run goes on in the next.")
    device: Literal["cuda", "cpu"] = Field("cuda", description="What the ranks compute on.")
    gpus_per_node: int = Field(8, ge=0, description="GPUs of a node; 0 on CPU nodes.")
    gpu_type: Word | None = Field(None, description="GPU type, where nodes have several.")
    processes_per_node: int | None = Field(None, gt=0, description="Ranks a node; by default one a GPU.")
    cpus_per_node: int | None = Field(None, gt=0, description="CPUs of a node that the ranks share.")
    memory: Word | None = Field(None, description="Memory of a node, such as `900G`; `0` is all of it.")
    signal_seconds: int = Field(
        300,
        ge=10,
        le=65535,
        description="Seconds before the time limit at which the ranks checkpoint and requeue.",
    )
    engine: str = Field(
        "ddp", description="`ddp`, the name of a shipped Accelerate config (`zero3`, `fsdp2`), or a file."
    )
    container: Container | None = Field(None, description="Image to run in; none runs on the node itself.")
    python: Line | None = Field(
        None, description="Interpreter; by default the one that submits, in a container `python`."
    )
    modules: tuple[Line, ...] = Field((), description="Environment modules to load.")
    environment: dict[str, Line] = Field({}, description="Environment variables; never secrets.")
    environment_files: tuple[Line, ...] = Field(
        (), description="Files of NAME=value lines with owner-only mode, for keys; sourced by the job."
    )
    setup: tuple[Line, ...] = Field(
        (), description="Shell lines of your own, run as they are before the ranks."
    )
    sbatch_options: tuple[Line, ...] = Field(
        (), description="Further `#SBATCH` options, such as `--mail-type=END`."
    )
    srun_options: tuple[Line, ...] = Field((), description="Further options of `srun`, one word each.")

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_slurm_time(cls, value: Any) -> Any:
        if isinstance(value, int) or not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", str(value)):
            raise ValueError("write a Slurm time in quotes, such as '04:00:00' or '1-12:00:00'")
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _environment_has_no_secrets(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise ValueError(f"{str(name)!r} is not the name of an environment variable")
            if _SECRET.search(str(name)):
                raise ValueError(
                    f"{name} looks like a secret; export it in your shell, or put it into a file of mode 600 "
                    "and name that in environment_files"
                )
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @field_validator("sbatch_options")
    @classmethod
    def _sbatch_options_leave_ours_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-"):
                raise ValueError(f"{option!r} is not an option; write it as '--name=value'")
            if _SET_BY_LAUNCHER.match(option):
                raise ValueError(f"{option!r} is set by qatapult itself; leave it out")
        return value

    @model_validator(mode="after")
    def _device_fits(self) -> ClusterProfile:
        if self.device == "cpu" and self.gpus_per_node:
            raise ValueError(f"device 'cpu' with gpus_per_node {self.gpus_per_node}; set gpus_per_node to 0")
        if self.device == "cuda" and not self.gpus_per_node:
            raise ValueError("device 'cuda' with gpus_per_node 0; set gpus_per_node, or device to 'cpu'")
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1


def user_profiles() -> Path:
    """The user's own folder of profiles."""
    return Path(typer.get_app_dir("qatapult")) / "slurm"


def shipped_profiles() -> Path:
    """The folder of the profiles that come with the package."""
    return Path(str(files("qatapult.configs") / "slurm"))


def known_profiles() -> list[str]:
    """Names of the shipped profiles and of the user's."""
    return sorted(
        {file.stem for folder in (user_profiles(), shipped_profiles()) for file in folder.glob("*.yaml")}
    )


def load_profile(name: str, changes: Sequence[str] = ()) -> ClusterProfile:
    """Read a profile.

    Args:
        name: a YAML file, or the name of one in the user's folder or among the shipped.
        changes: `field=value` from the command line; they win over the file.

    Raises:
        UserError: for a profile that does not exist or is not a whole and sensible one.
    """
    merged = _read(_locate(name), depth=0)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change!r} is not field=value, such as partition=debug")
        OmegaConf.update(merged, key, value, force_add=True)
    try:
        profile = ClusterProfile.model_validate(OmegaConf.to_container(merged, resolve=True))
    except ValidationError as error:
        raise UserError(
            f"cluster profile {name}: {describe_validation_error(error, ClusterProfile)}"
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(f"cluster profile {name}: {' '.join(str(error).split())[:200]}") from None
    for file in profile.environment_files:
        check_secret_file(Path(file).expanduser())
    return profile


def check_secret_file(file: Path) -> None:
    """Refuse a file of keys that others could read or change.

    Raises:
        UserError: it does not exist, belongs to someone else, or its mode is wider than 600.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"environment file {file}: {error.strerror}") from None
    if found.st_uid != os.geteuid():
        raise UserError(f"environment file {file} belongs to another user; it must be your own")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(f"environment file {file} can be read by others; chmod 600 it")


def _locate(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    for folder in (user_profiles(), shipped_profiles()):
        file = folder / f"{name.removesuffix('.yaml')}.yaml"
        if file.parent == folder and file.is_file():
            return file
    nearest = difflib.get_close_matches(name, known_profiles(), n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known are {', '.join(known_profiles())}"
    raise UserError(f"cluster profile {name!r} does not exist; {hint} (yours go into {user_profiles()})")


def _read(file: Path, depth: int) -> DictConfig:
    if depth > _MAX_EXTENDS:
        raise UserError(f"cluster profile {file}: 'extends' goes round in a circle")
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(
            f"cluster profile {file} is not valid YAML: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"cluster profile {file}: a profile is a mapping of fields, such as 'partition: gpu'")
    parent = loaded.pop("extends", None)
    if parent is None:
        return loaded
    # A user's `a100` may extend the shipped `a100`: a profile never extends itself.
    parent_file = _locate(str(parent))
    if parent_file.resolve() == file.resolve():
        parent_file = shipped_profiles() / f"{file.stem}.yaml"
        if not parent_file.is_file() or parent_file.resolve() == file.resolve():
            raise UserError(f"cluster profile {file}: 'extends' goes round in a circle")
    return cast(DictConfig, OmegaConf.merge(_read(parent_file, depth + 1), loaded))
