"""What only wandb has: axes, a run id that survives a restart, artifacts, alerts, and offline mode."""

from __future__ import annotations

import netrc
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from accelerate.tracking import WandBTracker

from qatapult.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from qatapult.trainer.recipe.schema import Recipe

#: Metrics whose best value is not the last one, with what wandb's summary keeps.
SUMMARIES = {"eval/perplexity": "min", "recovery/perplexity": "max", "train/loss": "min", "train/kl": "min"}

#: Seconds that wandb may take to be reached, to open the run, and to upload the rest at the end; what is left
#: stays on disk for `wandb sync`.
CONNECT_TIMEOUT, INIT_TIMEOUT, FINISH_TIMEOUT = 3.0, 20.0, 60.0


class QatapultWandb(WandBTracker):
    """Accelerate's wandb tracker with axes by tokens, alerts, and artifacts at the end."""

    def start(self) -> None:
        """Open the run; offline if the server does not answer."""
        import wandb

        if self.init_kwargs["mode"] == "online" and not answers(server()):
            self._go_offline(f"{server()} does not answer")
        try:
            super().start()
        except wandb.Error as error:
            if self.init_kwargs["mode"] != "online":
                raise
            wandb.teardown()  # the failed attempt still holds the run's id
            self._go_offline(f"wandb failed ({type(error).__name__})")
            super().start()
        define_metrics(self.run)
        if self.run.offline:
            _say(f"wandb is offline; upload later with: wandb sync {Path(self.run.sync_dir)}")

    def _go_offline(self, why: str) -> None:
        _say(f"{why}; going on offline")
        self.init_kwargs["mode"] = "offline"

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title=title, text=text, level="WARN")

    def finish_run(self, run: RunFolder, upload_checkpoint: bool, report: Mapping[str, Any] | None) -> None:
        """Store artifacts, put the last figures into the summary, and send the alert that it is finished."""
        for name, paths in artifacts(run, upload_checkpoint).items():
            self.run.log_artifact(_artifact(f"{name}-{self.run.id}", name, paths))
        if report is not None:
            self.run.summary.update(flat_metrics(report))
            self.run.alert(title=f"{report['name']} is finished", text=report["headline"], level="INFO")


def build_tracker(recipe: Recipe, run: RunFolder, run_id: str, job_type: str) -> QatapultWandb:
    """The tracker, not started yet.

    Raises:
        ImportError: if wandb is not installed.
    """
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=False,
        stop_on_fatal_error=False,
        silent=True,
        allow_offline_artifacts=True,
    )
    tracking = recipe.tracking
    return QatapultWandb(
        tracking.project,
        dir=str(_existing(run.logs)),
        id=run_id,
        name=recipe.name,
        resume="allow",
        group=tracking.group,
        job_type=job_type,
        tags=list(tracking.tags) or None,
        notes=recipe.description or None,
        config=recipe.model_dump(mode="json"),
        mode=choose_mode(),
        settings=settings,
    )


def choose_mode() -> str:
    """`WANDB_MODE` if it is set, else `online` where a key is known and `offline` where none is."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked
    if has_key():
        return "online"
    _say("no wandb key (WANDB_API_KEY, or `wandb login`): running offline")
    return "offline"


def has_key() -> bool:
    """Whether wandb has credentials for its server; none is read out or kept."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        known = netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    # Keys of the hosted service are kept under this name, whatever host serves it.
    return bool({urlsplit(server()).hostname, "api.wandb.ai"} & known.keys())


def server() -> str:
    """Address of the wandb server: `WANDB_BASE_URL`, or wandb's own default."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)


def answers(address: str) -> bool:
    """Whether something listens there. wandb itself would try for minutes where nothing does."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT):
            return True
    except OSError:
        return False


def define_metrics(run: Any) -> None:
    """Everything over tokens; the summary keeps the best perplexity and recovery, not the last."""
    run.define_metric("tokens", hidden=True)
    run.define_metric("*", step_metric="tokens")
    for name, summary in SUMMARIES.items():
        run.define_metric(name, step_metric="tokens", summary=summary)


def artifacts(run: RunFolder, upload_checkpoint: bool) -> dict[str, list[Path]]:
    """Files to store, by artifact type; only what exists."""
    found = {
        "recipe": [run.recipe],
        "report": [run.report_json, run.report_html],
        "checkpoint": [run.path / "export"] if upload_checkpoint else [],
    }
    existing = {name: [path for path in paths if path.exists()] for name, paths in found.items()}
    return {name: paths for name, paths in existing.items() if paths}


def flat_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the recovery table for wandb's summary: `{"final/perplexity/packed": 16.5, …}`."""
    return {
        f"final/{name}/{key}": value
        for name, metric in report["metrics"].items()
        for key, value in metric.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _artifact(name: str, kind: str, paths: list[Path]) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for path in paths:
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
    return artifact


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _existing(folder: Path) -> Path:
    # wandb writes into a temporary folder, and loses the run, where its own is missing.
    folder.mkdir(parents=True, exist_ok=True)
    return folder
