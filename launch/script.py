"""The sbatch script of a run or of a sweep, as text.

Every value that comes from outside is quoted for the shell by the template engine itself (`finalize`), and
none goes into an `#SBATCH` line unless it is a plain word: paths reach Slurm through the working directory.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from qatapult.launch.attempts import EXIT_FINISHED
from qatapult.launch.profile import ClusterProfile
from qatapult.trainer.loop.interrupt import INTERRUPTED as EXIT_REQUEUE
from qatapult.trainer.recipe.errors import UserError

JOB_LOG = "logs/slurm-%j.out"
ARRAY_LOG = "logs/slurm-%A_%a.out"


class Verbatim(str):
    """Text that goes into the script as it is."""

    __slots__ = ()


@dataclass(frozen=True)
class Job:
    """What a script is rendered from."""

    name: str
    folder: Path
    runs: Sequence[Path]
    workdir: Path
    profile: ClusterProfile
    nodes: int
    engine: str
    at_once: int | None = None
    script_name: str = "launch/job.sh"

    @property
    def is_array(self) -> bool:
        return self.at_once is not None


def render(job: Job) -> str:
    """The script.

    Raises:
        UserError: a path cannot be expressed in the container runtime's mounts or in Slurm's log names.
    """
    for character in ("\\", "%"):
        if character in str(job.folder):
            raise UserError(
                f"run folder {str(job.folder)!r} contains {character!r}, which Slurm's log names do not take"
            )
    profile = job.profile
    environment = Environment(
        finalize=_quote,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(
        (files("qatapult.launch") / "job.sh.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        folder=_comment(job.folder),
        script=_comment(job.script_name),
        directives=[Verbatim(line) for line in directives(job)],
        runs=job.runs,
        workdir=job.workdir,
        modules=profile.modules,
        environment=[(Verbatim(name), value) for name, value in _environment(job).items()],
        environment_files=[Path(file).expanduser() for file in profile.environment_files],
        setup=[Verbatim(line) for line in profile.setup],
        ranks_per_node=Verbatim(profile.ranks_per_node),
        signal_seconds=Verbatim(profile.signal_seconds),
        helper=Verbatim(_helper(job)),
        srun_options=[*profile.srun_options, *_pyxis_options(job)],
        container_prefix=_apptainer_prefix(job),
        node_command=node_command(job),
        exit_finished=Verbatim(EXIT_FINISHED),
        exit_requeue=Verbatim(EXIT_REQUEUE),
    )


def directives(job: Job) -> list[str]:
    """The options of `#SBATCH`, one a line."""
    profile = job.profile
    gpus = f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)
    options: list[tuple[str, object]] = [
        ("job-name", f"qatapult-{job.name}"),
        ("array", f"0-{len(job.runs) - 1}%{job.at_once}" if job.is_array else None),
        ("nodes", job.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", profile.cpus_per_node),
        ("gpus-per-node", gpus if profile.gpus_per_node else None),
        ("mem", profile.memory),
        ("time", profile.time),
        ("partition", profile.partition),
        ("account", profile.account),
        ("qos", profile.qos),
        ("constraint", profile.constraint),
        ("reservation", profile.reservation),
        ("signal", f"B:USR1@{profile.signal_seconds}"),
        ("open-mode", "append"),
        ("output", ARRAY_LOG if job.is_array else JOB_LOG),
    ]
    lines = [f"--{name}={_word(value)}" for name, value in options if value is not None]
    lines.append("--requeue")
    if profile.exclusive:
        lines.append("--exclusive")
    return [*lines, *profile.sbatch_options]


def node_command(job: Job) -> str:
    """What a node's one task runs: `accelerate launch` with the node's rank, in a shell that knows it."""
    engine = engine_arguments(job.engine, job.nodes * job.profile.ranks_per_node)
    words = [interpreter(job.profile), "-m", "accelerate.commands.launch", *engine]
    return (
        f"trap '' USR1 TERM; exec {shlex.join(words)}"
        ' --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$QATAPULT_WORLD_SIZE"'
        ' --machine_rank "$SLURM_NODEID"'
        ' --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m qatapult.launch.rank "$1"'
    )


def engine_arguments(engine: str, ranks: int) -> list[str]:
    """Arguments of `accelerate launch` that choose the engine.

    Args:
        engine: `ddp`, the name of a shipped Accelerate config, or a file.
        ranks: processes in all; `--multi_gpu` is for more than one only.
    """
    if engine == "ddp":
        several = [] if ranks == 1 else ["--multi_gpu"]
        return [*several, "--mixed_precision", "no", "--dynamo_backend", "no"]
    # Without "standard", DeepSpeed would start the other nodes itself, over ssh.
    return ["--config_file", str(engine_config(engine)), "--deepspeed_multinode_launcher", "standard"]


def engine_config(engine: str) -> Path:
    """The Accelerate config of that name.

    Raises:
        UserError: there is none.
    """
    if Path(engine).is_file():
        return Path(engine).absolute()
    folder = Path(str(files("qatapult.configs") / "accelerate"))
    file = folder / f"{engine}.yaml"
    if file.is_file() and file.parent == folder:
        return file
    known = ", ".join(["ddp", *sorted(entry.stem for entry in folder.glob("*.yaml"))])
    raise UserError(f"engine {engine!r} is neither a file nor one of {known}")


def interpreter(profile: ClusterProfile) -> str:
    """The Python that the job runs."""
    return profile.python or ("python" if profile.container else sys.executable)


def _environment(job: Job) -> dict[str, str]:
    """The profile's variables, and on CPU nodes the one that tells Accelerate so."""
    # DeepSpeed chooses its device itself; with the variable set, Accelerate would silently fall back to DDP.
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if job.profile.device == "cpu" and job.engine == "ddp" else {}
    return {**on_cpu, "PYTHONUNBUFFERED": "1", **job.profile.environment}


def _mounts(job: Job) -> list[str]:
    if job.profile.container is None:
        return []
    ours = dict.fromkeys(str(path) for path in (job.workdir, job.folder, *(run.parent for run in job.runs)))
    for path in ours:
        if any(character in path for character in ",:"):
            raise UserError(f"{path!r} contains ',' or ':', which containers' mounts do not take")
    return [*(f"{path}:{path}" for path in ours), *job.profile.container.mounts]


def _pyxis_options(job: Job) -> list[str]:
    container = job.profile.container
    if container is None or container.runtime != "pyxis":
        return []
    mounts, workdir = ",".join(_mounts(job)), job.workdir
    image = f"--container-image={container.image}"
    return [image, f"--container-mounts={mounts}", f"--container-workdir={workdir}", *container.options]


def _apptainer_prefix(job: Job) -> list[str]:
    container = job.profile.container
    if container is None or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if job.profile.device == "cuda" else []
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    return [
        "apptainer",
        "exec",
        *gpus,
        *binds,
        "--pwd",
        str(job.workdir),
        *container.options,
        container.image,
    ]


def _helper(job: Job) -> str:
    """How the batch shell runs Python: where the ranks run, but as a single process."""
    words = [*_apptainer_prefix(job), interpreter(job.profile)]
    if pyxis := _pyxis_options(job):
        words = ["srun", "--nodes=1", "--ntasks=1", "--overlap", *job.profile.srun_options, *pyxis, *words]
    return " ".join(map(_quote, words))


def _quote(value: object) -> str:
    """A word for bash. Line breaks and the like become escapes: no line of the script is made of data."""
    word = str(value)
    if isinstance(value, Verbatim):
        return word
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "$'"
        + "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in escaped)
        + "'"
    )


def _word(value: object) -> str:
    """A value of an `#SBATCH` line; the schema lets only plain words this far."""
    word = str(value)
    if not word.isprintable() or any(character in word for character in " '\"\\#"):
        raise UserError(f"{word!r} cannot stand in an #SBATCH line")
    return word


def _comment(value: object) -> Verbatim:
    """A value for a comment: one line, whatever it holds."""
    return Verbatim(shlex.quote("".join(c if c.isprintable() else "?" for c in str(value))))
