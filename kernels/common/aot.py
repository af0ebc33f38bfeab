"""Compile Triton kernels for GPUs that this machine does not have, and read what came out.

A kernel's module lists the configurations that it ships in a function `aot_cases() -> list[AotCase]`;

    python -m qatapult.kernels.common.aot qatapult.kernels.fake_quant.triton_kernel

compiles each of them for the A100 (sm_80) and the H100 / H200 (sm_90) and tabulates registers, stack
(spills), shared memory and instructions. `--json` gives the same for programs; `--sass FOLDER` also writes
PTX and SASS. In Python, `compile_case` gives the texts themselves, so that a test can look for an
instruction:

    report = compile_case(case, 80)
    assert report.stack_bytes == 0 and "IMMA" in report.sass

Kernels that were imported under `TRITON_INTERPRET=1` cannot be compiled. Tests, which set it, call
`reports_of(module)`, which compiles in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

#: Compute capability: the A100, and the H100 and H200.
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of a kernel.

    Attributes:
        name: shown in tables; unique within the module.
        kernel: the `@triton.jit` function.
        signature: type of each argument that is not a constexpr, in Triton's notation: `*bf16`, `*fp32`,
        `*i8`, `i32`,
            `fp32`. Arguments of the kernel that appear neither here nor in `constexprs` are an error.
        constexprs: value of each `tl.constexpr` argument (and of arguments that are None at the call).
        num_warps: as at the launch.
        num_stages: as at the launch.
        aligned: arguments that the launch passes as multiples of 16 (Triton specialises on it by itself at a
            launch); by default all pointers. Add the strides and sizes that are such in practice.
        capabilities: of the GPUs that it ships for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True)
class AotReport:
    """What a case compiled to.

    Attributes:
        name: of the case.
        capability: 80 or 90.
        registers: a thread; 255 is the limit.
        stack_bytes: a thread; more than 0 means registers spilled to memory.
        shared_bytes: a program.
        instructions: SASS instructions in the kernel, a static count.
        ptx: the PTX text.
        sass: the disassembly.
    """

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    ptx: str
    sass: str


def compile_case(case: AotCase, capability: int) -> AotReport:
    """Compile one configuration for one GPU generation.

    Raises:
        RuntimeError: if the kernel was imported under Triton's interpreter.
        ValueError: if the case does not name all arguments of the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise RuntimeError(f"{case.name}: imported under TRITON_INTERPRET=1; use reports_of() there")
    names = case.kernel.arg_names
    unknown = set(names) ^ (set(case.signature) | set(case.constexprs))
    if unknown:
        raise ValueError(f"{case.name}: arguments {sorted(unknown)} are not in the kernel or not in the case")
    aligned = case.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _disassemble(binary.asm["cubin"])
    return AotReport(
        name=case.name,
        capability=capability,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=binary.metadata.shared,
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE)),
        ptx=binary.asm["ptx"],
        sass=sass,
    )


def reports_of(module: str, capabilities: tuple[int, ...] = CAPABILITIES) -> list[AotReport]:
    """Compile all cases of a module in a process of its own, whatever `TRITON_INTERPRET` is here.

    Raises:
        RuntimeError: with the compiler's message, if a case does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    wanted = ",".join(map(str, capabilities))
    command = [sys.executable, "-m", __name__, module, "--json", "--capabilities", wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation of {module} failed:\n{done.stderr[-4000:]}")
    return [AotReport(**fields) for fields in json.loads(done.stdout)]


def table(reports: list[AotReport]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| kernel | GPU | registers | stack bytes | shared bytes | instructions |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {report.name} | sm_{report.capability} | {report.registers} | {report.stack_bytes} "
        f"| {report.shared_bytes} | {report.instructions} |"
        for report in reports
    ]
    return "\n".join(lines)


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and SASS of a cubin, by the tool that the Triton wheel carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}, text


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels of a module ahead of time")
    parser.add_argument("module", help="a module with aot_cases()")
    parser.add_argument("--json", action="store_true", help="reports as JSON, with PTX and SASS")
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)), help="such as 80,90")
    parser.add_argument("--sass", type=Path, help="folder to write PTX and SASS into")
    options = parser.parse_args()
    cases: list[AotCase] = import_module(options.module).aot_cases()
    capabilities = [int(capability) for capability in options.capabilities.split(",")]
    reports = [
        compile_case(case, capability)
        for case in cases
        for capability in capabilities
        if capability in case.capabilities
    ]
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
        for report in reports:
            stem = re.sub(r"\W+", "_", f"{report.name}_sm{report.capability}")
            (options.sass / f"{stem}.ptx").write_text(report.ptx)
            (options.sass / f"{stem}.sass").write_text(report.sass)
    print(json.dumps([asdict(report) for report in reports]) if options.json else table(reports))


if __name__ == "__main__":
    main()
