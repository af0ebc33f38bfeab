"""Compile a C++ file once a machine and call it through ctypes: no torch headers, so it takes two seconds.

A CPU path is a file of `extern "C"` functions on raw pointers. `load(path)` compiles it with the machine's
compiler for its processor, keeps the library in the user's cache folder, and returns it; or None, with one
warning, where there is no compiler: operators then run their torch reference. Nothing happens at import.

Arithmetic is IEEE as written: multiply-add is not contracted (unless the caller of `load` wants it) and nothing is
reassociated, except in reductions that the source marks with `#pragma omp simd reduction`. Loops marked with
`#pragma omp parallel` run on the thread pool of torch itself, for its OpenMP runtime is linked where its wheel
carries one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-I{Path(__file__).parent}",
)  # fmt: skip
#: Where compiled libraries are kept; by default below the user's cache folder.
CACHE_VARIABLE = "QATAPULT_CACHE"


@functools.cache
def load(source: Path, contract: bool = False) -> ctypes.CDLL | None:
    """The compiled library of a C++ file, or None where it cannot be compiled.

    Args:
        source: the file; it includes standard headers and those of this folder only.
        contract: whether `a * b + c` may be one instruction that rounds once: faster, and not the same bits on
            every processor.
    """
    flags = (*_FLAGS, f"-ffp-contract={'fast' if contract else 'off'}")
    compiler = _compiler()
    if compiler is None:
        _warn(source, "no C++ compiler was found (g++ or clang++, or set CXX)")
        return None
    name = f"{source.parent.name}_{source.stem}-{_key(compiler, flags, source)}.so"
    library = _cache_folder() / name
    try:
        if not library.exists():
            _compile(compiler, flags, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        _warn(source, str(getattr(error, "stderr", "") or error))
        return None


def _warn(source: Path, why: str) -> None:
    warnings.warn(
        f"{source.parent.name}/{source.name} could not be compiled, so its operators run in plain "
        f"torch, which is several times slower: {why}",
        stacklevel=3,
    )


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = (named,) if named else ("g++", "clang++", "c++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _compile(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Build beside the target and move: processes that compile at the same time do not see half a file."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        try:
            _run(compiler, *flags, "-fopenmp", "-c", str(source), "-o", f"{built}.o")
            _run(compiler, "-shared", f"{built}.o", *_openmp_runtime(), "-o", str(built))
        except subprocess.CalledProcessError:
            # Without OpenMP (clang without its runtime) the code runs on one thread.
            _run(compiler, *flags, "-shared", str(source), "-o", str(built))
        built.replace(library)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _openmp_runtime() -> list[str]:
    """The runtime that torch has loaded, so that there is one thread pool; else the compiler's own."""
    package = Path(torch.__file__).parent
    found = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    return [str(found[0])] if found else ["-fopenmp"]


def _key(compiler: str, flags: tuple[str, ...], source: Path) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [file.read_text() for file in (source, *sorted(Path(__file__).parent.glob("*.h")))]
    parts = (version, *flags, *_openmp_runtime(), _processor(), *texts)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and instruction set: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    """The user's own folder: a library from a folder that others can write to is never loaded."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qatapult" / "kernels"
