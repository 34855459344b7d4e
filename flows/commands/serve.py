"""``tripoise serve``: server, deployments and workers of one machine, until it is told to stop."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import StoreOption, open_store


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 4200,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs of this machine: a worker for each. Default: none.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Light runs at the same time.")] = 4,
    folder: Annotated[
        Path | None, typer.Option("--from", help="Folder like deployments/; default: the shipped one.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Start a Prefect server, all deployments and workers on this machine; stops them on Ctrl-C or SIGTERM."""
    from flows.deploying.serve import installation, start_workers

    os.environ["TRIPOISE_STORE"] = str(open_store(store).root)
    try:
        with installation(host, port) as found:
            os.environ.update({name: value for name, value in found.environment.items() if name.startswith("PREFECT_")})
            # Takes seconds, in which the server starts.
            from flows.deploying.apply import apply, limit_light_runs, server
            from flows.deploying.declared import SHIPPED, read_declared

            declared = read_declared(folder or SHIPPED, "local")
            found.await_health()
            with server() as client:
                apply(declared, client, gpus or 1)
                limit_light_runs(limit, client)
            start_workers(found, gpus)
            typer.echo(f"Tripoise is at http://{host}:{port} (API: {found.url}). Ctrl-C stops it.")
            while True:
                found.check()
                time.sleep(1)
    except KeyboardInterrupt:
        typer.echo("stopped")
