"""From a recipe to a job: the run folder, the script, Slurm's check, and the submission."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qatapult.launch import slurm
from qatapult.launch.folder import LaunchFolder, Submission, check_run, prepare_run
from qatapult.launch.profile import ClusterProfile, load_profile
from qatapult.launch.script import ARRAY_LOG, JOB_LOG, Job, render
from qatapult.trainer.recipe.errors import UserError
from qatapult.trainer.recipe.schema import Recipe
from qatapult.trainer.run_folder import RunFolder, write_atomically

_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Target:
    """Where a job goes: the profile by name, and what the command line changed of it."""

    profile_name: str = "default"
    changes: tuple[str, ...] = ()
    nodes: int = 1
    engine: str | None = None
    workdir: Path = field(default_factory=Path.cwd)

    def load(self) -> ClusterProfile:
        """The profile with the changes."""
        return load_profile(self.profile_name, self.changes)


def script_for(recipe: Recipe, runs: Path, target: Target) -> str:
    """The script that `submit_run` would submit; nothing is written.

    Raises:
        UserError: the run folder, the profile or a path does not do.
    """
    run = RunFolder((runs / recipe.name).absolute())
    check_run(recipe, run)
    return render(_job(recipe.name, run.path, [run.path], target))


def submit_run(recipe: Recipe, runs: Path, target: Target) -> Submission:
    """Submit a run as one job; one that stopped or was cancelled goes on where it was.

    Raises:
        UserError: the run is under way or finished already, or Slurm refuses it; then nothing is left behind.
    """
    text = script_for(recipe, runs, target)
    check_idle(LaunchFolder(RunFolder((runs / recipe.name).absolute())))
    slurm.check_script(text)
    return _send(prepare_run(recipe, runs), text, target)


def submit_sweep(
    name: str, recipes: Sequence[Recipe], runs: Path, target: Target, at_once: int
) -> list[Submission]:
    """Submit several runs as one job array.

    Args:
        name: of the sweep; its script and logs go to `runs/<name>.sweep`.
        recipes: one a run, with different names.
        runs: folder of the runs.
        target: where it goes.
        at_once: how many may run at the same time.

    Raises:
        UserError: as `submit_run`; nothing is submitted unless all of it can be.
    """
    text = sweep_script(name, recipes, runs, target, at_once)
    for recipe in recipes:
        check_idle(LaunchFolder(RunFolder((runs / recipe.name).absolute())))
    slurm.check_script(text)
    launches = [prepare_run(recipe, runs) for recipe in recipes]
    folder = sweep_folder(name, runs)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    script = folder / "job.sh"
    write_atomically(script, text, mode=_OWNER_ONLY)
    for launch in launches:
        _forgive(launch, target, script)
    array = slurm.submit(script, folder)
    submissions = []
    for task, launch in enumerate(launches):
        log = folder / ARRAY_LOG.replace("%A", array).replace("%a", str(task))
        submission = _submission(target, f"{array}_{task}", script, log)
        launch.write_submission(submission)
        submissions.append(submission)
    return submissions


def sweep_script(name: str, recipes: Sequence[Recipe], runs: Path, target: Target, at_once: int) -> str:
    """The script that `submit_sweep` would submit; nothing is written."""
    folders = [RunFolder((runs / recipe.name).absolute()) for recipe in recipes]
    for recipe, run in zip(recipes, folders, strict=True):
        check_run(recipe, run)
    job = _job(name, sweep_folder(name, runs), [run.path for run in folders], target)
    return render(replace(job, at_once=at_once, script_name="job.sh"))


def sweep_folder(name: str, runs: Path) -> Path:
    """Where a sweep's script and its jobs' logs are."""
    return (runs / f"{name}.sweep").absolute()


def resubmit(launch: LaunchFolder) -> Submission:
    """Submit a run again as it was, after it stopped, was cancelled, or was forgotten by Slurm.

    Raises:
        UserError: it is under way or finished, or was not submitted to Slurm.
    """
    submission = launch.submission
    if submission is None or submission.where != "slurm":
        raise UserError(f"run {launch.run.name} was not submitted to Slurm; use `qatapult submit`")
    check_idle(launch)
    target = Target(
        submission.profile or "default",
        submission.profile_changes,
        submission.nodes,
        submission.engine,
        Path(submission.workdir),
    )
    text = render(_job(launch.run.name, launch.run.path, [launch.run.path], target))
    slurm.check_script(text)
    return _send(launch, text, target)


def check_idle(launch: LaunchFolder) -> None:
    """Refuse a run that is finished or already on its way.

    Raises:
        UserError: it is.
    """
    run, submission = launch.run, launch.submission
    if run.stage("report").exists():
        raise UserError(f"run {run.name} is finished; its report is {run.report_html}")
    if submission is None or submission.where != "slurm" or submission.job is None:
        return
    state = slurm.jobs([submission.job]).get(submission.job)
    if state is not None and not state.ended:
        raise UserError(f"run {run.name} is already job {submission.job} ({state.state.lower()})")


def _send(launch: LaunchFolder, text: str, target: Target) -> Submission:
    write_atomically(launch.script, text, mode=_OWNER_ONLY)
    _forgive(launch, target, launch.script)
    job = slurm.submit(launch.script, launch.run.path)
    submission = _submission(target, job, launch.script, launch.run.path / JOB_LOG.replace("%j", job))
    launch.write_submission(submission)
    return submission


def _forgive(launch: LaunchFolder, target: Target, script: Path) -> None:
    """Start counting failures anew. Before the job is there: it would not start a cancelled run."""
    if launch.read_attempts():
        launch.append_attempt({"event": "resume"})
    launch.write_submission(_submission(target, None, script, None))


def _job(name: str, folder: Path, runs: Sequence[Path], target: Target) -> Job:
    profile = target.load()
    return Job(
        name=name,
        folder=folder,
        runs=runs,
        workdir=target.workdir,
        profile=profile,
        nodes=target.nodes,
        engine=target.engine or profile.engine,
    )


def _submission(target: Target, job: str | None, script: Path, log: Path | None) -> Submission:
    profile = target.load()
    return Submission(
        where="slurm",
        job=job,
        script=str(script),
        job_log=str(log) if log else None,
        workdir=str(target.workdir),
        nodes=target.nodes,
        processes=target.nodes * profile.ranks_per_node,
        profile=target.profile_name,
        profile_changes=target.changes,
        engine=target.engine,
    )
