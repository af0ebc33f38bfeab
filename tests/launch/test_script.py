"""The sbatch script: what it asks Slurm for, and that hostile names stay names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qatapult.launch.profile import ClusterProfile, load_profile
from qatapult.launch.script import Job, render
from qatapult.launch.submit import Target, script_for, submit_run
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.loading import load_recipe

HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`;touch pwned\n#SBATCH --uid=0\ntouch pwned &"


def job(tmp_path: Path, profile: ClusterProfile, nodes: int = 2, **changes: object) -> Job:
    run = tmp_path / "runs" / "r"
    settings = {"name": "r", "folder": run, "runs": [run], "workdir": tmp_path, "engine": profile.engine}
    return Job(profile=profile, nodes=nodes, **{**settings, **changes})  # type: ignore[arg-type]


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_it_asks_for_what_the_profile_says(tmp_path: Path) -> None:
    changes = ["partition=gpu", "account=me", "qos=high", "constraint=a100&nvlink", "gpu_type=a100"]
    asked = directives(render(job(tmp_path, load_profile("a100-8", changes), nodes=4)))
    for wanted in (
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=a100:8",
        "--cpus-per-task=96",
        "--mem=0",
        "--time=04:00:00",
        "--partition=gpu",
        "--account=me",
        "--qos=high",
        "--constraint=a100&nvlink",
        "--signal=B:USR1@300",
        "--requeue",
        "--exclusive",
        "--open-mode=append",
    ):
        assert wanted in asked


def test_an_engine_is_an_accelerate_config_and_never_ssh(tmp_path: Path) -> None:
    config = tmp_path / "zero.yaml"
    config.write_text("distributed_type: DEEPSPEED\n")
    text = render(job(tmp_path, load_profile("a100-8"), engine=str(config)))
    assert f"--config_file {config}" in text
    assert "--deepspeed_multinode_launcher standard" in text
    with pytest.raises(UserError, match="neither a file nor one of ddp"):
        render(job(tmp_path, load_profile("a100-8"), engine="zero33"))


def test_containers_wrap_the_ranks_and_mount_the_run(tmp_path: Path) -> None:
    pyxis = render(job(tmp_path, load_profile("a100-8-pyxis")))
    assert "--container-image=/shared/images/qatapult.sqsh" in pyxis
    assert f"{tmp_path}/runs:{tmp_path}/runs" in pyxis
    apptainer = render(job(tmp_path, load_profile("a100-8-apptainer")))
    assert "apptainer exec --nv --bind" in apptainer
    assert sys.executable not in apptainer  # the image has its own Python
    with pytest.raises(UserError, match="',' or ':'"):
        render(job(tmp_path, load_profile("a100-8-pyxis"), workdir=tmp_path / "a:b"))


def test_an_array_has_a_cap(tmp_path: Path) -> None:
    runs = [tmp_path / "runs" / name for name in "abc"]
    asked = directives(render(job(tmp_path, load_profile("cpu"), runs=runs, at_once=2)))
    assert "--array=0-2%2" in asked


@pytest.mark.parametrize("kind", ["cpu", "a100-8-apptainer", "a100-8-pyxis"])
def test_hostile_paths_and_values_do_nothing_but_name(tmp_path: Path, kind: str) -> None:
    """Run the script with Slurm's commands replaced by ones that only note what they were called with."""
    workdir = tmp_path / HOSTILE.replace("/", "")
    run = workdir / "runs" / "r"
    (run / "logs").mkdir(parents=True)
    changes = {"environment": {"NOTE": HOSTILE}, "python": str(tmp_path / "bin" / "python'$(touch pwned)")}
    profile = load_profile(kind).model_copy(update=changes)
    script = tmp_path / "job.sh"
    script.write_text(render(job(tmp_path, profile, folder=run, runs=[run], workdir=workdir)))

    programs = tmp_path / "bin"
    programs.mkdir()
    note = '#!/bin/bash\nprintf "%s\\0" "$0" "$PWD" "$NOTE" "$@" >> "$NOTES"\n'
    for name in ("srun", "apptainer", "python'$(touch pwned)"):
        (programs / name).write_text(note)
    (programs / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = requeue ] && echo requeued >> "$NOTES"; echo node1\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    done = subprocess.run(
        ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "notes").read_text().split("\0")
    assert str(run) in words  # the folder arrived as one word, as it is
    assert words[1] == str(workdir)
    assert words[2] == HOSTILE
    assert not list(tmp_path.rglob("pwned"))
    assert not [line for line in directives(script.read_text()) if "uid" in line]


def test_a_recipes_name_cannot_be_hostile() -> None:
    with pytest.raises(UserError, match="name: use letters"):
        load_recipe("tiny-random-w4a8", ["name='$(touch pwned)'"])


def test_a_dry_run_writes_nothing_and_a_real_script_is_the_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-random-w4a8")
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    text = script_for(recipe, tmp_path / "runs", Target("cpu"))
    assert not (tmp_path / "runs").exists()
    assert "very-secret-key" not in text

    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue"):
        (programs / name).write_text("#!/bin/bash\necho 12\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    submission = submit_run(recipe, tmp_path / "runs", Target("cpu"))
    assert submission.job == "12"
    run = tmp_path / "runs" / recipe.name
    assert stat.S_IMODE((run / "launch" / "job.sh").stat().st_mode) == 0o600
    assert yaml.safe_load((run / "recipe.yaml").read_text())["name"] == recipe.name
    for file in run.rglob("*"):
        assert file.is_dir() or "very-secret-key" not in file.read_text()


def test_a_run_folder_of_another_recipe_or_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny-random-w4a8")
    run = tmp_path / recipe.name
    run.mkdir()
    (run / "recipe.yaml").write_text(
        yaml.safe_dump(load_recipe("tiny-random-w4a8", ["seed=5"]).model_dump(mode="json"))
    )
    with pytest.raises(UserError, match="seed: 5 → 0"):
        script_for(recipe, tmp_path, Target("cpu"))
    monkeypatch.setattr(os, "geteuid", lambda: run.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to user"):
        script_for(recipe, tmp_path, Target("cpu"))
