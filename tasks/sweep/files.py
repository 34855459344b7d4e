"""The report of a sweep: that of the models on test, and beside it every trial on validation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from tasks.recipes import recipe_yaml
from tasks.report.pareto import ParetoPoint, write_pareto
from tasks.reporting import Entry, SecondOpinion, dimension_scores, report_step
from tasks.scores import read_record
from tasks.steps import Step
from tasks.store import Ref, Store
from tasks.suite import Suite
from tasks.sweep.choice import choose, pareto_set
from tasks.sweep.trials import Trial
from tasks.tables import write_rows

# Raise it whenever equal trials give other files.
SWEEP_VERSION: Final = 1
TRIALS_FILE: Final = "trials.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep found on validation."""

    trials: Sequence[Trial]
    pareto: Sequence[int]
    """Trials of the Pareto set."""
    chosen: Mapping[int, str]
    """Trials that are tested, with the reason, in the order of the choice."""


def outcome(trials: Sequence[Trial], keep: int) -> Outcome:
    """The Pareto set of the completed trials, and up to ``keep`` of it; a repeated model counts once."""
    points = {
        one.number: one.values for one in trials if one.state == "complete" and one.repeats is None and one.values
    }
    return Outcome(trials, pareto_set(points), choose(points, keep))


def entry_name(trial: Trial) -> str:
    """How the report calls the merge of a trial."""
    return f"{trial.recipe.method.name if trial.recipe else '–'} (trial {trial.number})"


def sweep_report_step(
    title: str,
    suite: Suite,
    entries: Sequence[Entry],
    interference: Ref,
    found: Outcome,
    search: Mapping[str, Any],
    store: Store,
    second: Sequence[SecondOpinion] = (),
) -> Step:
    """The report on test, with ``pareto.html``, ``trials.json`` and ``trials.parquet`` beside the page.

    Args:
        title: heads the report.
        suite: what was run.
        entries: base, experts and chosen merges; those with validation scores are drawn beside the trials.
        interference: of the experts.
        found: the trials and the choice.
        search: how was searched: settings of the sweep, JSON-able.
        store: where all of it lies.
        second: see :func:`tasks.reporting.report_step`.
    """
    report = report_step(title, suite, entries, interference, store, second)
    search = dict(search) | {"optuna": version("optuna")}

    def make(out: Path) -> None:
        report.make(out)
        rows = [_row(trial, found, suite, store) for trial in found.trials]
        record = {"title": title, "search": search, "trials": rows}
        (out / TRIALS_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _write_table(rows, out / "trials.parquet")
        write_pareto(title, suite.title, _points(rows, entries, suite, store), out)

    identity = {
        **report.identity,
        "sweep": {
            "version": SWEEP_VERSION,
            "search": search,
            "trials": [_identity(trial) for trial in found.trials],
            "chosen": {str(number): why for number, why in found.chosen.items()},
        },
    }
    own = {ref for trial in found.trials for ref in (*trial.first, *trial.scores)}
    return replace(report, identity=identity, parents=tuple(dict.fromkeys((*report.parents, *sorted(own)))), make=make)


def read_trials(folder: Path) -> dict[str, Any]:
    """What ``trials.json`` of a report folder holds."""
    found: dict[str, Any] = json.loads((folder / TRIALS_FILE).read_text(encoding="utf-8"))
    return found


def _identity(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "point": trial.point,
        "state": trial.state,
        "reason": trial.reason,
        "repeats": trial.repeats,
        "recipe": trial.recipe and recipe_yaml(trial.recipe),
        "model": trial.model and trial.model.digest,
        "first": [ref.digest for ref in trial.first],
        "scores": [ref.digest for ref in trial.scores],
    }


def _row(trial: Trial, found: Outcome, suite: Suite, store: Store) -> dict[str, Any]:
    """One trial flat, scores None where there are none."""
    scores = trial.scores or trial.first
    values = dict(zip(("helpful", "honest", "harmless"), trial.values or (None,) * 3, strict=True))
    return {
        "trial": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "repeats": trial.repeats,
        "settings": trial.point,
        "model": f"{trial.model.kind}/{trial.model.digest}" if trial.model else None,
        "method": trial.recipe.method.name if trial.recipe else None,
        **values,
        "mean": fmean(trial.values) if trial.values else None,
        "minimum": min(trial.values) if trial.values else None,
        "n": sum(read_record(ref, store)["n"] for ref in scores) if trial.values else None,
        "partial": any(read_record(ref, store)["partial"] for ref in scores) if trial.values else None,
        "pareto": trial.number in found.pareto,
        "chosen": found.chosen.get(trial.number),
    }


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [("trial", pa.int64()), ("state", pa.string()), ("reason", pa.string()), ("repeats", pa.int64())]
        + [("settings", pa.string()), ("model", pa.string()), ("method", pa.string())]
        + [(name, pa.float64()) for name in ("helpful", "honest", "harmless", "mean", "minimum")]
        + [("n", pa.int64()), ("partial", pa.bool_()), ("pareto", pa.bool_()), ("chosen", pa.string())]
    )
    write_rows([{**row, "settings": json.dumps(row["settings"])} for row in rows], path, schema)


def _points(
    rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry], suite: Suite, store: Store
) -> list[ParetoPoint]:
    """What is drawn and listed: the models that were merged, then every trial."""
    found = []
    for entry in entries:
        if entry.role != "merged" and entry.validation:
            scores = dimension_scores(entry.validation, suite, store)
            found.append(ParetoPoint(entry.name, entry.role, scores, {}, ""))
    for row in rows:
        kind = "chosen" if row["chosen"] else "pareto" if row["pareto"] else row["state"]
        scores = {d: row[d] for d in ("helpful", "honest", "harmless", "mean")} if row["mean"] is not None else {}
        repeated = "" if row["repeats"] is None else f"the model of trial {row['repeats']}"
        note = row["chosen"] or row["reason"] or repeated
        found.append(ParetoPoint(f"trial {row['trial']}", kind, scores, row["settings"], note))
    return found
