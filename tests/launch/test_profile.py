"""Cluster profiles: what is accepted, what is refused with which line, and whose file wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatapult.launch.profile import known_profiles, load_profile, user_profiles
from qatapult.trainer.recipe.errors import UserError


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["default", "a100-8", "a100-8-pyxis", "a100-8-apptainer", "cpu"])
def test_shipped_profiles_load(name: str) -> None:
    assert name in known_profiles()
    assert load_profile(name).ranks_per_node > 0


def test_the_users_profile_wins_and_may_extend_the_shipped_one_of_the_same_name() -> None:
    write(
        user_profiles(),
        "a100-8",
        "extends: a100-8\npartition: mine\nenvironment: {NCCL_SOCKET_IFNAME: ib0}\n",
    )
    profile = load_profile("a100-8")
    assert profile.partition == "mine"
    assert profile.gpus_per_node == 8
    assert profile.environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert profile.environment["NCCL_DEBUG"] == "WARN"


def test_changes_of_the_command_line_win() -> None:
    profile = load_profile("cpu", ["partition=debug", "time=10:00", "processes_per_node=3"])
    assert (profile.partition, profile.time, profile.ranks_per_node) == ("debug", "10:00", 3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("partitoin: gpu", "unknown field 'partitoin'; did you mean 'partition'?"),
        ("partition: 'gpu; rm -rf ~'", "partition"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "partition"),
        ("time: 4:00:00", "in quotes"),
        ("environment: {WANDB_API_KEY: abc}", "WANDB_API_KEY looks like a secret"),
        ("environment: {'A B': abc}", "not the name of an environment variable"),
        ("sbatch_options: ['--output=/etc/passwd']", "set by qatapult itself"),
        ('sbatch_options: ["--comment=a\\nrm"]', "sbatch_options"),
        ("device: cpu", "set gpus_per_node to 0"),
        ("container: {runtime: podman, image: x}", "container.runtime"),
        ("extends: self", "circle"),
        ("- a list", "mapping of fields"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = write(tmp_path, "self", text.replace("self", str(tmp_path / "self.yaml")))
    with pytest.raises(UserError) as refusal:
        load_profile(str(file))
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'a100-8'"):
        load_profile("a100-9")


def test_a_file_of_keys_must_be_the_owners_alone(tmp_path: Path) -> None:
    keys = tmp_path / "keys.env"
    keys.write_text("WANDB_API_KEY=secret\n")
    keys.chmod(0o644)
    file = write(tmp_path, "mine", f"extends: cpu\nenvironment_files: ['{keys}']\n")
    with pytest.raises(UserError, match="chmod 600"):
        load_profile(str(file))
    keys.chmod(0o600)
    assert load_profile(str(file)).environment_files == (str(keys),)
