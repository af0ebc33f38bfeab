"""`qatapult cancel` and `qatapult resume`: for a run on a cluster and on this machine alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qatapult.launch import slurm
from qatapult.launch.folder import LaunchFolder, all_runs
from qatapult.launch.local import cancel_local, enqueue, local_state, read_entry, start_queue
from qatapult.launch.owner import check_folder_is_ours
from qatapult.launch.submit import resubmit
from qatapult.trainer.recipe.errors import UserError


def cancel(launch: LaunchFolder) -> str:
    """Stop a run for good, with a checkpoint if its ranks are quick enough; `resume` takes it up again.

    Returns:
        One line for people.

    Raises:
        UserError: the run is another user's, was not submitted, or Slurm does not answer.
    """
    check_folder_is_ours(launch.run.path)
    submission = launch.submission
    if submission is None:
        raise UserError(
            f"run {launch.run.name} was not submitted; stop `qatapult train` with Ctrl-C where it runs"
        )
    if launch.run.stage("report").exists():
        return f"{launch.run.name} is finished already"
    # First the mark, then the signal: a script that is told to stop must know that it is for good.
    launch.write_submission(replace(submission, cancelled=True))
    if submission.where == "local":
        cancel_local(launch)
        return f"{launch.run.name} is cancelled"
    if submission.job:
        slurm.cancel(submission.job)
    return f"{launch.run.name} is cancelled (job {submission.job})"


def resume(launch: LaunchFolder) -> str:
    """Send a run off again that stopped, failed or was cancelled; its failures are forgiven.

    Returns:
        One line for people.

    Raises:
        UserError: it is under way, finished, another user's, or was not submitted.
    """
    check_folder_is_ours(launch.run.path)
    submission = launch.submission
    if submission is not None and submission.where == "local":
        if launch.run.stage("report").exists():
            raise UserError(f"run {launch.run.name} is finished; its report is {launch.run.report_html}")
        enqueue(launch, submission)
        start_queue(launch.run.path.parent)
        return f"{launch.run.name} is queued on this machine"
    return f"{launch.run.name} is job {resubmit(launch).job}"


def restart_queue(runs: Path) -> Sequence[str]:
    """Go on with this machine's queue after the machine was restarted.

    Returns:
        Names of the runs that it has.
    """
    waiting = [launch.run.name for launch in all_runs(runs) if local_state(launch) or _was_running(launch)]
    if waiting:
        start_queue(runs)
    return waiting


def _was_running(launch: LaunchFolder) -> bool:
    """A run whose process went with the machine: the queue will settle the attempt and queue it again."""
    entry = read_entry(launch)
    return entry is not None and entry.pid != 0
