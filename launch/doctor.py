"""`qatapult doctor`: what this machine has, what is missing for which purpose, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from qatapult.launch import slurm
from qatapult.launch.profile import user_profiles
from qatapult.trainer.recipe.errors import UserError

OK, WARN, FAIL = "ok", "warn", "FAIL"

_NEEDED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pydantic")
_OPTIONAL = {
    "triton": "kernels on GPUs: pip install 'qatapult[triton]'",
    "deepspeed": "ZeRO engines: pip install 'qatapult[deepspeed]'",
    "compressed-tensors": "that export format: pip install 'qatapult[export]'",
    "lm-eval": "evaluation on tasks: pip install 'qatapult[lm-eval]'",
    "wandb": "tracking: pip install 'qatapult[wandb]'",
}
_FABRIC_TIMEOUT_SECONDS = 180
_LITTLE_DISK = 50 * 2**30
_LITTLE_SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    name: str
    level: str
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(runs: Path, ranks: int = 0, quick: bool = False) -> list[Finding]:
    """Look at this machine.

    Args:
        runs: folder of the runs, for disk space.
        ranks: also start so many ranks and let them talk.
        quick: only versions, GPUs and disk, for a container's health check.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _gpus, lambda: _disk(runs)]
    if not quick:
        checks += [_collectives, _triton, _deepspeed, _limits, _slurm, _network]
    if ranks:
        checks.append(lambda: _fabric(ranks))
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    version = platform.python_version()
    supported = sys.version_info[:2] >= (3, 11)
    yield Finding(
        "python", OK if supported else FAIL, version, "" if supported else "use Python 3.11 or newer"
    )
    for package in _NEEDED:
        found = _version(package)
        yield Finding(
            package, OK if found else FAIL, found or "missing", "" if found else f"pip install {package}"
        )
    for package, purpose in _OPTIONAL.items():
        found = _version(package)
        yield Finding(
            package, OK if found else WARN, found or "missing", "" if found else f"needed for {purpose}"
        )


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if shutil.which("nvidia-smi") and built is None:
            remedy = "this torch is a CPU build: install one for CUDA"
        elif shutil.which("nvidia-smi"):
            remedy = f"torch is built for CUDA {built}: compare with the driver's version in nvidia-smi"
        else:
            remedy = "no driver here: fine on a login node or for small models, not for training at scale"
        yield Finding("gpus", WARN, "none that torch can use", remedy)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        detail = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        new_enough = properties.major >= 8
        remedy = "" if new_enough else "int8 tensor cores for these kernels need sm_80 (A100) or newer"
        yield Finding(f"gpu {index}", OK if new_enough else WARN, detail, remedy)


def _collectives() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        here = torch.distributed.is_gloo_available()
        yield Finding(
            "gloo",
            OK if here else FAIL,
            "available" if here else "missing",
            "" if here else "reinstall torch",
        )
        return
    if not torch.distributed.is_nccl_available():
        yield Finding("nccl", FAIL, "missing", "install a CUDA build of torch")
        return
    yield Finding("nccl", OK, ".".join(map(str, torch.cuda.nccl.version())))


def _triton() -> Iterator[Finding]:
    if util.find_spec("triton") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("triton kernels", OK, "not tried: no GPU; the compiled CPU path is used")
        return
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        yield Finding(
            "triton kernels", FAIL, "no C compiler", "Triton builds its launcher with one: install gcc"
        )
        return
    import triton

    yield Finding("triton kernels", OK, f"{triton.__version__}, with {compiler}")


def _deepspeed() -> Iterator[Finding]:
    if _version("deepspeed") is None:
        return
    code = (
        "import json, warnings; warnings.simplefilter('ignore')\n"
        "from deepspeed.ops.op_builder import FusedAdamBuilder, CPUAdamBuilder\n"
        "print('@' + json.dumps({b.NAME: b().is_compatible(verbose=False)"
        " for b in (FusedAdamBuilder, CPUAdamBuilder)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    answer = next((line[1:] for line in done.stdout.splitlines() if line.startswith("@")), None)
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding("deepspeed operators", FAIL, last, "reinstall deepspeed against this torch")
        return
    lacking = [name for name, compatible in json.loads(answer).items() if not compatible]
    remedy = "they build themselves at first use: that needs nvcc and a C++ compiler" if lacking else ""
    detail = f"cannot be built: {', '.join(lacking)}" if lacking else "can be built"
    yield Finding("deepspeed operators", WARN if lacking else OK, detail, remedy)


def _disk(runs: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    remedy = (
        ""
        if free > _LITTLE_DISK
        else "a 7B checkpoint with optimizer takes 80 GiB: use --runs on a larger disk"
    )
    yield Finding(
        "disk for runs", OK if not remedy else WARN, f"{free / 2**30:.0f} GiB free at {existing}", remedy
    )
    if not os.access(existing, os.W_OK):
        yield Finding("run folder", FAIL, f"{existing} cannot be written", "choose another --runs folder")
    shared = Path("/dev/shm")
    if shared.exists() and (size := shutil.disk_usage(shared).total) < _LITTLE_SHARED_MEMORY:
        remedy = "NCCL and data loaders need more: docker run --shm-size=16g"
        yield Finding("shared memory", WARN, f"{size / 2**20:.0f} MiB", remedy)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        "open files", OK if files >= 4096 else WARN, str(files), "" if files >= 4096 else "ulimit -n 65536"
    )
    if Path("/dev/infiniband").exists():
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        unlimited = locked == resource.RLIM_INFINITY
        remedy = "" if unlimited else "InfiniBand needs `ulimit -l unlimited` (docker: --ulimit memlock=-1)"
        yield Finding(
            "locked memory", OK if unlimited else WARN, "unlimited" if unlimited else str(locked), remedy
        )


def _slurm() -> Iterator[Finding]:
    if not slurm.available():
        yield Finding(
            "slurm", WARN, "not installed here", "submit from a login node, or use `submit --local`"
        )
        return
    try:
        names = slurm.partitions()
    except UserError as error:
        yield Finding("slurm", WARN, str(error), "to submit from here: check SLURM_CONF, munge and slurmctld")
        return
    yield Finding("slurm", OK, f"{slurm.version()}, partitions {', '.join(names)}")
    yield Finding("cluster profiles", OK, f"your own go into {user_profiles()}")


def _network() -> Iterator[Finding]:
    if _version("wandb") is None:
        return
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = base.partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    if os.environ.get("WANDB_MODE") == "offline":
        yield Finding("tracker", OK, "offline by WANDB_MODE; send runs later with `wandb sync`")
        return
    try:
        socket.create_connection(
            (name, int(port or (80 if base.startswith("http:") else 443))), timeout=5
        ).close()
    except OSError as error:
        yield Finding("tracker", WARN, f"{name}: {error}", "set WANDB_MODE=offline, and `wandb sync` later")
        return
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_knows(name)
    remedy = "" if has_key else "wandb login, or a file of mode 600 in the profile's environment_files"
    yield Finding(
        "tracker", OK if has_key else WARN, f"{name} answers" + ("" if has_key else "; no key"), remedy
    )


def _fabric(ranks: int) -> Iterator[Finding]:
    """Start ranks here that reduce a tensor: whether they find each other, and how fast."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "qatapult.launch.fabric", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_FABRIC_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            remedy = "set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME to the network between the nodes"
            yield Finding("fabric", FAIL, f"{ranks} ranks hung for {_FABRIC_TIMEOUT_SECONDS} s", remedy)
            return
        if done.returncode != 0 or not answer.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no output"]
            yield Finding("fabric", FAIL, lines[0].strip()[:300], "run it with NCCL_DEBUG=INFO to see more")
            return
        measured = json.loads(answer.read_text(encoding="utf-8"))
    detail = (
        f"{measured['ranks']} ranks on {measured['device']}: all-reduce of {measured['megabytes']} MB in "
        f"{measured['milliseconds']:.1f} ms, {measured['gigabytes_per_second']:.1f} GB/s bus bandwidth"
    )
    yield Finding("fabric", OK, detail)


def _netrc_knows(host: str) -> bool:
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return file.exists() and host in file.read_text(encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
