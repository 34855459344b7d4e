"""The report step: compare scores that are in the store and write the page; and what is read of it again."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tasks.report import leaderboard_markdown, leaderboard_rows, write_report
from tasks.reporting.entries import Entry, SecondOpinion
from tasks.reporting.inputs import report_inputs
from tasks.steps import Step
from tasks.store import Ref, Store
from tasks.suite import Suite

REPORT_VERSION: Final = 4
LEADERBOARD_FILE: Final = "leaderboard.json"


def report_step(
    title: str,
    suite: Suite,
    entries: Sequence[Entry],
    interference: Ref,
    store: Store,
    second: Sequence[SecondOpinion] = (),
) -> Step:
    """Compare all entries and write the report: page, parquet and JSON.

    Args:
        title: heads the report.
        suite: what was run; over several seeds, of any of them.
        entries: the models, of one name in each seed.
        interference: of the experts, over several seeds those of the first.
        store: where all of it lies.
        second: what other judges say of the same responses; only their agreement is told.
    """

    def make(out: Path) -> None:
        told = tuple(one.record(store) for one in second)
        inputs = replace(report_inputs(title, suite, entries, interference, store), agreement=told)
        write_report(inputs, out)
        table = {
            "title": title,
            "notes": list(inputs.comparison.notes),
            "markdown": leaderboard_markdown(inputs.comparison),
            "rows": leaderboard_rows(inputs.comparison),
        }
        (out / LEADERBOARD_FILE).write_text(json.dumps(table, indent=1))
        (out / "recipes").mkdir()
        several = len(inputs.comparison.seeds) > 1
        for entry in entries:
            if entry.recipe:
                folder = out / "recipes" / (f"seed-{entry.seed}" if several else "")
                folder.mkdir(exist_ok=True)
                file = re.sub(r"\W+", "-", entry.name).strip("-") + ".yaml"
                (folder / file).write_text(entry.recipe, encoding="utf-8")

    identity = {
        "version": REPORT_VERSION,
        "title": title,
        "suite": suite.title,
        "benchmarks": [[one.task, one.dimension, one.weight, one.higher_is_better] for one in suite.benchmarks],
        "interference": interference.digest,
        "second": [[one.model, one.first.digest, one.second.digest] for one in second],
        "entries": [
            {
                "name": entry.name,
                "seed": entry.seed,
                "role": entry.role,
                "model": entry.model.digest,
                "scores": [ref.digest for ref in entry.scores],
                "validation": [ref.digest for ref in entry.validation],
                "recipe": entry.recipe,
            }
            for entry in entries
        ],
    }
    parents = {ref for entry in entries for ref in (entry.model, *entry.scores, *entry.validation)}
    parents |= {one.second for one in second}
    return Step("report", f"report {title}", identity, (*sorted(parents), interference), make)


@dataclass(frozen=True, slots=True)
class StoredReport:
    """What is shown of a finished report outside its page."""

    title: str
    notes: list[str]
    """The headline sentences."""
    markdown: str
    rows: list[dict[str, Any]]


def read_report(folder: Path) -> StoredReport:
    """Read title and leaderboard of a report folder."""
    stored = json.loads((folder / LEADERBOARD_FILE).read_text())
    return StoredReport(**stored)
