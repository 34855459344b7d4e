"""Options that several commands share, and what every command begins and ends with."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.store import Store

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Root of the store; default: TRIPOISE_STORE, else ~/.cache/tripoise.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the result; appears in one piece or not at all.")]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace a folder that holds something else.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only so many samples of each benchmark; partial.")
]


def open_store(root: Path | None) -> Store:
    """The store of --store, else the default one."""
    return Store(root, Store.default().mirror) if root else Store.default()


def prepare_prefect() -> None:
    """Settings that Prefect reads when it is imported; what the user set stays."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # What fails is told once, by main(); Prefect's own record of it is in its UI.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")


def answer(summary: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result: as one JSON object, or for people."""
    typer.echo(json.dumps(summary) if as_json else text)
