"""`qatapult dashboard`: a live page over a folder of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatapult.trainer.recipe.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("dashboard")(dashboard)


def dashboard(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs.")] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to bind; anything but the loopback needs the token that is printed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8765,
) -> None:
    """Show runs live in the browser: states, curves that move while runs go on, logs, reports. Read-only.

    On a cluster keep the loopback and tunnel: ssh -L 8765:localhost:8765 login-node

    Example: qatapult dashboard runs
    """
    from qatapult.trainer.dashboard.server import build_server

    if not runs.is_dir():
        raise UserError(f"{runs} is not a folder; name the folder that holds the runs")
    try:
        server, shown, address = build_server(runs, host, port)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    shown.overview.start()
    typer.echo(f"dashboard: {address}  (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("")
    finally:
        shown.overview.stop()
        server.server_close()
