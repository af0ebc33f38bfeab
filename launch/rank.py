"""One rank of a launched run: `accelerate launch … -m qatapult.launch.rank RUN_FOLDER`.

It takes signals before anything heavy is imported, checks that the world has the size the launcher asked for
(Accelerate starts worlds of one in silence when it is told the wrong thing), sends its output to
`logs/rank-<n>.log`, runs the pipeline, and leaves word of how it ended for the batch script.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from qatapult.launch.attempts import write_outcome
from qatapult.launch.folder import LaunchFolder
from qatapult.trainer.loop.interrupt import INTERRUPTED, InterruptFlag
from qatapult.trainer.recipe.errors import EXIT_STATUS, UserError
from qatapult.trainer.recipe.loading import load_recipe
from qatapult.trainer.run_folder import RunFolder


def main() -> int:
    """Run this rank.

    Returns:
        0 when the run is finished or asks for another attempt (the launcher would take any other status for a
        crash and kill the rest), 2 for what the user has to mend, 1 for a failure.
    """
    with InterruptFlag() as flag:
        launch = LaunchFolder(RunFolder(Path(sys.argv[1])))
        # What the pipeline tells people to type if they want to go on by hand.
        sys.argv[1:] = ["train", str(launch.run.recipe), "--runs", str(launch.run.path.parent)]
        rank = int(os.environ.get("RANK", "0"))
        _write_to(launch.rank_log(rank))
        code, reason = _run(launch.run)
        if code == INTERRUPTED and flag.received is not None:
            reason = flag.received.name
        if code != 0:
            write_outcome(launch, os.environ["QATAPULT_ATTEMPT"], rank, code, reason)
        return 0 if code == INTERRUPTED else code


def check_world() -> None:
    """Assert that there are as many ranks as the launcher asked for.

    Raises:
        UserError: there are not.
    """
    wanted, found = os.environ.get("QATAPULT_WORLD_SIZE"), os.environ.get("WORLD_SIZE", "1")
    if wanted is not None and wanted != found:
        raise UserError(
            f"the job was to run {wanted} ranks and this process is one of {found}; check the engine's "
            "Accelerate config (num_processes, distributed_type) against the cluster profile"
        )


def _run(run: RunFolder) -> tuple[int, str]:
    try:
        check_world()
        from qatapult.trainer.pipeline import run as run_pipeline

        run_pipeline(load_recipe(run.recipe), run.path.parent, quiet=False, as_json=False)
    except UserError as error:
        print(f"qatapult: error: {error}", file=sys.stderr)
        return EXIT_STATUS, str(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return code, f"exit status {code}"
    except (
        Exception
    ) as error:  # the process ends here: the traceback goes to its log, one line to the launcher
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return 0, "finished"


def _write_to(log: Path) -> None:
    """Send this process's output, and that of its libraries, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
