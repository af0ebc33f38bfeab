"""Every engine on real processes (gloo, CPU) gives the losses of one process; a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

import qatapult.trainer.loop.engine as engine_module
from qatapult.trainer.loop.checkpoint import list_checkpoints, read_manifest
from qatapult.trainer.loop.engine import _keep_weights_in_fp32, create_accelerator
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Weights alone are quantized here: an activation between two codes flips with the last bit of a sum, and every engine
# takes its sums in another order. `test_ddp_with_quantized_activations` says how far that goes.
CALM = (
    "quantization.activations=null",
    "qat.optimizer.learning_rate=1e-5",
    "qat.tokens=5120",
    "qat.evaluate_every_tokens=1280",
    "qat.global_batch_tokens=256",
)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(
    engine: str, processes: int, folder: Path, overrides: tuple[str, ...]
) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    worker = [str(HERE / "engine_worker.py"), str(folder), engine, *overrides]
    if processes == 1:
        return [sys.executable, *worker], environment
    if engine.startswith("zero"):
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "configs" / "deepspeed" / f"{engine}.json"),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    elif engine == "fsdp2":
        environment |= FSDP
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*launch, f"--master-port={free_port()}", *worker], environment


def run(engine: str, processes: int, folder: Path, *overrides: str) -> dict[str, Any]:
    arguments, environment = command(engine, processes, folder, (*CALM, *overrides))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    result["lines"] = [line for line in RunFolder(folder).read_metrics() if "train/loss" in line]
    result["losses"] = losses(folder)
    return result


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in RunFolder(folder).read_metrics() if "train/loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("none", 1, tmp_path_factory.mktemp("alone"))


def assert_same(result: dict[str, Any], alone: dict[str, Any]) -> None:
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert result["scales"] == pytest.approx(alone["scales"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)


def test_ddp(alone: dict[str, Any], tmp_path: Path) -> None:
    result = run("ddp", 2, tmp_path)
    assert result["processes"] == 2
    assert "MULTI_CPU" in result["engine"]
    assert_same(result, alone)


def test_ddp_with_quantized_activations(tmp_path: Path) -> None:
    grid = "quantization.activations={bits: 8, granularity: token}"
    one, two = run("none", 1, tmp_path / "one", grid), run("ddp", 2, tmp_path / "two", grid)
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)


def test_uneven_batches_count_no_token_twice(alone: dict[str, Any], tmp_path: Path) -> None:
    """Four blocks a step on three processes: two of them have one block and a filler."""
    assert_same(run("ddp", 3, tmp_path), alone)


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_deepspeed(engine: str, alone: dict[str, Any], tmp_path: Path) -> None:
    result = run(engine, 2, tmp_path)
    assert "DEEPSPEED" in result["engine"]
    assert_same(result, alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2-offload", "zero3-offload"])
def test_states_in_main_memory(engine: str, tmp_path: Path, alone: dict[str, Any]) -> None:
    """On a CPU all is in main memory anyway, but the engine goes through the motions; and a checkpoint comes back."""
    arguments, environment = command(engine, 2, tmp_path, (*CALM, "stop=9"))
    subprocess.run(arguments, env=environment, capture_output=True, timeout=280, check=False)
    assert len(losses(tmp_path)) == 10
    assert_same(run(engine, 2, tmp_path), alone)


def test_fsdp2(alone: dict[str, Any], tmp_path: Path) -> None:
    result = run("fsdp2", 2, tmp_path)
    assert "FSDP" in result["engine"]
    assert_same(result, alone)
    assert result["teacher_share"] < 0.51  # of its parameters, between two steps


LAYERS = ("qat.distillation.hidden={weight: 1}", "qat.distillation.attention={weight: 1, pairs: auto}")


@pytest.fixture(scope="module")
def alone_with_layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("none", 1, tmp_path_factory.mktemp("alone-layers"), *LAYERS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_losses_between_layers(engine: str, alone_with_layers: dict[str, Any], tmp_path: Path) -> None:
    result = run(engine, 2, tmp_path, *LAYERS, "qat.gradient_checkpointing=true")
    assert_same(result, alone_with_layers)
    for name in ("train/hidden_loss", "train/attention_loss"):
        expected = [line[name] for line in alone_with_layers["lines"]]
        assert all(value > 0 for value in expected)
        assert [line[name] for line in result["lines"]] == pytest.approx(expected, rel=1e-3)


def test_a_sharded_teacher_is_never_whole(tmp_path: Path) -> None:
    """Of 16 layers and a small vocabulary, a process holds its half and what is gathered at the moment."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    worker = [f"--master-port={free_port()}", str(HERE / "teacher_memory_worker.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | FSDP
    done = subprocess.run([*launch, *worker], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        shares = json.loads((tmp_path / f"shares-{rank}.json").read_text())
        assert len(shares) == 16  # one a layer, while it computes
        assert 0.5 < max(shares) <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_bf16_rounds_products_and_not_the_grid(engine: str, tmp_path: Path) -> None:
    """Weights and scales stay in fp32: in bf16 the first loss would already be a tenth higher."""
    alone = run("none", 1, tmp_path / "alone", "qat.precision=bf16")
    result = run(engine, 2, tmp_path / engine, "qat.precision=bf16")
    assert result["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert result["losses"] == pytest.approx(alone["losses"], rel=5e-3)
    assert result["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)


def test_deepspeed_that_would_round_the_grid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"'fp16' does not run under DeepSpeed"):
        create_accelerator(load_recipe("tiny-random-w4a8", ["qat.precision=fp16"]))
    plugin = SimpleNamespace(deepspeed_config={"fp16": {"enabled": False}, "bf16": {"enabled": True}})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    with pytest.raises(UserError, match=r"bf16\.enabled rounds weights"):
        _keep_weights_in_fp32(SimpleNamespace(state=state))  # type: ignore[arg-type]


def test_sharded_engines_on_a_cpu_give_freed_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    for name in ("keep_freed_memory", "return_freed_memory"):
        monkeypatch.setattr(engine_module, name, lambda name=name: chosen.append(name))
    engines = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    for device in ("cpu", "cuda"):
        for engine in engines:
            accelerator = SimpleNamespace(device=torch.device(device), distributed_type=engine)
            engine_module.choose_allocation(accelerator)  # type: ignore[arg-type]
    assert chosen == ["keep_freed_memory"] * 2 + ["return_freed_memory"] * 2
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    engine_module.choose_allocation(SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert len(chosen) == 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_four_processes_and_tied_embeddings(engine: str, tmp_path: Path) -> None:
    tied = ("model.source=random:tiny-tied", "qat.gradient_checkpointing=true")
    alone = run("none", 1, tmp_path / "alone", *tied)
    assert_same(run(engine, 4, tmp_path / engine, *tied), alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_killed_run_goes_on(engine: str, tmp_path: Path) -> None:
    whole = run(engine, 2, tmp_path / "whole", "qat.checkpoints.every_tokens=512")
    folder = tmp_path / "killed"
    arguments, environment = command(engine, 2, folder, (*CALM, "qat.checkpoints.every_tokens=512"))
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(losses(folder)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    resumed = run(engine, 2, folder, "qat.checkpoints.every_tokens=512")
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert resumed["scales"] == pytest.approx(whole["scales"], rel=1e-6)


def test_ddp_waits_for_no_gradient_of_what_a_schedule_leaves_out(tmp_path: Path) -> None:
    late = ("qat.schedule.weights_start=0.5", "qat.tokens=1280")
    alone, shared = (run("none", n, tmp_path / str(n), *late) for n in (1, 2))
    # Before the start the student is its teacher, and what is lost to rounding some 1e-6.
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-7)
    assert shared["scales"] == pytest.approx(alone["scales"], rel=1e-4)


def events(folder: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in RunFolder(folder).read_metrics() if "event" in line]


@pytest.mark.parametrize("engine", ["zero2", *(slow(name) for name in ("ddp", "fsdp2", "zero1", "zero3"))])
def test_a_nan_on_one_rank_is_left_out_by_all(engine: str, tmp_path: Path) -> None:
    """Two micro-batches a step, and the second has the NaN: nothing of the first may stay behind."""
    options = ("nan=2,5,6,7", "qat.batch_size=1", "qat.checkpoints.every_tokens=512", "qat.tokens=2560")
    alone = run("none", 1, tmp_path / "alone", *options)
    two = run(engine, 2, tmp_path / "two", *options)
    expected = [("skip", 3), ("skip", 6), ("skip", 7), ("skip", 8), ("rollback", 5)]
    assert events(tmp_path / "alone") == expected
    assert events(tmp_path / "two") == expected
    assert_same(two, alone)


CHANGES = [
    (("fsdp2", 2), ("none", 1)),
    *(
        slow(before, after)
        for before, after in [
            (("ddp", 2), ("none", 1)),
            (("none", 1), ("zero3", 2)),
            (("fsdp2", 2), ("ddp", 2)),
            (("zero2", 2), ("none", 1)),
            (("zero3", 2), ("fsdp2", 2)),
            (("zero1", 4), ("zero3", 2)),
            (("ddp", 3), ("zero2", 2)),
            (("zero3", 4), ("zero2", 2)),
        ]
    ),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_under_another_engine(
    before: tuple[str, int], after: tuple[str, int], alone: dict[str, Any], tmp_path: Path
) -> None:
    arguments, environment = command(*before, tmp_path, (*CALM, "stop=9"))
    subprocess.run(arguments, env=environment, capture_output=True, timeout=280, check=False)
    [checkpoint] = list_checkpoints(RunFolder(tmp_path).checkpoints)[-1:]
    assert read_manifest(checkpoint)["processes"] == before[1]
    assert read_manifest(checkpoint)["step"] == 10
    assert len(losses(tmp_path)) == 10
    assert_same(run(*after, tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero3", "fsdp2")])
def test_a_run_in_bf16_goes_on_under_another_engine(before: str, after: str, tmp_path: Path) -> None:
    """Were weights and scales rounded on the way, the losses would differ by a tenth."""
    alone = run("none", 1, tmp_path / "alone", "qat.precision=bf16")
    arguments, environment = command(before, 2, tmp_path / "two", (*CALM, "qat.precision=bf16", "stop=9"))
    subprocess.run(arguments, env=environment, capture_output=True, timeout=280, check=False)
    assert len(losses(tmp_path / "two")) == 10
    result = run(after, 2, tmp_path / "two", "qat.precision=bf16")
    assert result["losses"] == pytest.approx(alone["losses"], rel=5e-3)


@pytest.mark.parametrize("engine", ["ddp", slow("fsdp2"), slow("zero2")])
def test_a_rank_that_hangs_is_named_by_the_others(engine: str, tmp_path: Path) -> None:
    options = ("hang=2", "qat.tokens=1024", "qat.guards.hang_timeout=4")
    arguments, environment = command(engine, 2, tmp_path, (*CALM, *options))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    named = [line for line in done.stderr.splitlines() if "hangs or falls behind" in line]
    assert any(line.startswith("qatapult: rank 1 on ") and "1 other waits" in line for line in named)
    assert len(losses(tmp_path)) == 4
