"""``tripoise deploy``: all deployments, work pools, limits and automations onto a Prefect server."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import JsonOption, answer, prepare_prefect


def deploy(
    profile: Annotated[str, typer.Option("--profile", help="Where runs run: local, docker or kubernetes.")] = "local",
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="Folder with prefect.yaml, automations.yaml and pools/; default: the shipped one."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPU runs at the same time; default: as it is, else 1.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the server of PREFECT_API_URL have what the folder declares, and nothing else of ours."""
    prepare_prefect()
    from flows.deploying.apply import apply, server
    from flows.deploying.declared import SHIPPED, read_declared

    declared = read_declared(folder or SHIPPED, profile)
    with server() as client:
        done = apply(declared, client, gpus)
    answer({"profile": profile, "applied": done}, as_json, "\n".join(done))
