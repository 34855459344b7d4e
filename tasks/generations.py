"""Generations on disk: what a model said to every prompt of a benchmark that a second stage judges."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tasks.scores import Asked
from tasks.store import Ref, Store
from tasks.tables import read_rows, write_rows

GENERATIONS_FILE: Final = "generations.parquet"
ASKED_FILE: Final = "asked.json"


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt and what the model said; several responses where they were sampled."""

    id: str
    """The same for every model: position and content of the document."""
    prompt: str
    target: str
    """The reference answer, as the task file gives it; may be empty."""
    responses: tuple[str, ...]
    """One or more; greedy decoding gives one."""
    document: dict[str, Any]
    """The benchmark's own columns, JSON-able: what a judge may need beside the prompt, such as unit tests."""


def write_generations(generations: Sequence[Generation], asked: Asked, out: Path) -> None:
    """Write what was said, and how it was asked, into a folder."""
    rows = [
        {**asdict(one), "responses": list(one.responses), "document": json.dumps(one.document, sort_keys=True)}
        for one in generations
    ]
    write_rows(rows, out / GENERATIONS_FILE)
    (out / ASKED_FILE).write_text(json.dumps(asdict(asked), indent=1, sort_keys=True))


def read_generations(ref: Ref, store: Store) -> tuple[list[Generation], Asked]:
    """What :func:`write_generations` wrote."""
    folder = store.folder(ref)
    generations = [
        Generation(**{**row, "responses": tuple(row["responses"]), "document": json.loads(row["document"])})
        for row in read_rows(folder / GENERATIONS_FILE)
    ]
    return generations, Asked(**json.loads((folder / ASKED_FILE).read_text()))
