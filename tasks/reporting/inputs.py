"""What a report shows, read from the store: the comparison, interference, decisions and recipes."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, get_args

from tasks import comparison
from tasks.comparison import Comparison, ModelSamples
from tasks.merge import read_diagnostics
from tasks.report import Interference, LayerDiagnostics, ReportInputs
from tasks.reporting.dimensions import dimension_scores
from tasks.reporting.entries import Entry
from tasks.reporting.provenance import conditions, provenance
from tasks.scores import read_record, read_values
from tasks.store import Ref, Store
from tasks.suite import Dimension, Suite
from tasks.vectors import read_interference


def report_inputs(title: str, suite: Suite, entries: Sequence[Entry], interference: Ref, store: Store) -> ReportInputs:
    """Everything that a report shows but for second opinions; arguments as of the report step."""
    measured = read_interference(interference, store)
    first = [entry for entry in entries if entry.seed == min(one.seed for one in entries)]
    diagnostics = {
        entry.name: tuple(LayerDiagnostics(one.tensor, one.ranks, one.weights) for one in found)
        for entry in first
        if entry.role == "merged" and (found := read_diagnostics(entry.model, store))
    }
    return ReportInputs(
        title=title,
        comparison=compared(suite, entries, store),
        interference=Interference(
            tensors=measured.tensors,
            pairs=tuple(" · ".join(pair) for pair in measured.pairs),
            cosine=measured.cosines,
            overall=measured.overall,
        ),
        diagnostics=diagnostics,
        recipes={entry.name: entry.recipe for entry in first if entry.recipe},
        provenance=provenance(entries, store),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=conditions(entries, store),
    )


def compared(suite: Suite, entries: Sequence[Entry], store: Store) -> Comparison:
    """Statistics over all entries; see :func:`tasks.comparison.compare`."""
    benchmarks = [
        comparison.Benchmark(one.task, one.dimension, one.weight, one.higher_is_better) for one in suite.benchmarks
    ]
    lost = _lost_chat_template(entries, store)
    models = [
        replace(_samples(entry, suite, store), chat_template_lost=(entry.seed, entry.name) in lost) for entry in entries
    ]
    return comparison.compare(models, benchmarks, suite=suite.title)


def _lost_chat_template(entries: Sequence[Entry], store: Store) -> set[tuple[int, str]]:
    """Seed and name of each merge without a chat template where a model that it was made from has one."""
    has: dict[tuple[int, str], bool | None] = {
        (entry.seed, entry.name): read_record(entry.scores[0], store).get("has_chat_template") for entry in entries
    }
    given = {entry.seed for entry in entries if entry.role in ("base", "expert") and has[entry.seed, entry.name]}
    return {
        (entry.seed, entry.name)
        for entry in entries
        if entry.role == "merged" and entry.seed in given and has[entry.seed, entry.name] is False
    }


def _samples(entry: Entry, suite: Suite, store: Store) -> ModelSamples:
    records = [read_record(ref, store) for ref in entry.scores]
    return ModelSamples(
        name=entry.name,
        role=entry.role,
        # An expert named after one of the three H is taken as trained for it.
        specialty=entry.name if entry.role == "expert" and entry.name in get_args(Dimension) else None,
        digest=entry.model.digest,
        settings=_settings(entry, store),
        values=read_values(entry.scores, store),
        validation=dimension_scores(entry.validation, suite, store) if entry.validation else {},
        partial=any(record["partial"] for record in records),
        seed=entry.seed,
    )


def _settings(entry: Entry, store: Store) -> dict[str, Any]:
    method = store.manifest(entry.model).details.get("recipe", {}).get("method", {})
    return {{"name": "method"}.get(name, name): value for name, value in method.items()}
