"""The report step: read scores, compare them, write the page; and the one rule by which a scale is chosen."""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Final, get_args

from merging_core.digest import digest_of
from merging_core.errors import NumericalError
from tasks import comparison
from tasks.comparison import Comparison, ModelSamples, Role
from tasks.deliver import deliver
from tasks.judges.agreement import agreement
from tasks.merge import read_diagnostics
from tasks.report import (
    Interference,
    LayerDiagnostics,
    ReportInputs,
    leaderboard_markdown,
    leaderboard_rows,
    write_report,
)
from tasks.scores import SAMPLES_FILE, read_record, read_values
from tasks.steps import Step
from tasks.store import MANIFEST, Ref, Store, package_versions, record_files
from tasks.suite import Dimension, Suite
from tasks.vectors import read_interference

REPORT_VERSION: Final = 4
LEADERBOARD_FILE: Final = "leaderboard.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model in a report."""

    name: str
    role: Role
    model: Ref
    scores: Sequence[Ref]
    """On the test split, one for each benchmark."""
    validation: Sequence[Ref] = ()
    """On the validation split, where a choice was made by them."""
    recipe: str = ""
    """Text of the recipe, for merges."""
    seed: int = 0
    """Of world and training. Entries of one name are one line of the report."""


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """Scores of one model on one benchmark by two judges."""

    model: str
    """How the report calls the model."""
    first: Ref
    """The scores that count."""
    second: Ref
    """Those of the second judge, of the same responses."""

    def record(self, store: Store) -> dict[str, Any]:
        """How far the two agree, JSON-able; see :func:`tasks.judges.agreement.agreement`."""
        judges = ", ".join(read_record(ref, store)["judge"]["name"] for ref in (self.first, self.second))
        return {"model": self.model, "judges": judges, **agreement(self.first, self.second, store).record()}


def dimension_scores(scores: Sequence[Ref], suite: Suite, store: Store) -> dict[str, float]:
    """Score of each H, and their ``mean``, from scores on a suite; see :mod:`tasks.comparison`.

    Of several scores of one benchmark, as several seeds give, the mean counts.

    Raises:
        NumericalError: if a benchmark has no value: no reply of its judge could be read.
    """
    measured: dict[str, list[float]] = {}
    for ref in scores:
        record = read_record(ref, store)
        if record["value"] is None:
            raise NumericalError(
                f"{ref}: none of the {record['unparsed']} verdicts on benchmark {record['task']} could be read. "
                "Look at the judge's replies in its samples, or take another judge."
            )
        measured.setdefault(record["task"], []).append(record["value"])
    records = {task: fmean(values) for task, values in measured.items()}
    found = {}
    for dimension in get_args(Dimension):
        members = [one for one in suite.benchmarks if one.dimension == dimension]
        values = [records[one.task] for one in members]
        turned = [value if one.higher_is_better else 1 - value for one, value in zip(members, values, strict=True)]
        found[dimension] = fmean(turned, weights=[one.weight for one in members])
    return found | {"mean": fmean(found.values())}


def best_on_validation(validation: Sequence[Sequence[Ref]], suite: Suite, store: Store) -> int:
    """Index of the candidate with the highest mean of the three H on validation, over all seeds; of equals, the first.

    The planner asks before there are scores: then it is the first.
    """
    if not all(store.home(ref).exists() for scores in validation for ref in scores):
        return 0
    means = [dimension_scores(scores, suite, store)["mean"] for scores in validation]
    return means.index(max(means))


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
        inputs = replace(_inputs(title, suite, entries, interference, store), agreement=told)
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


def deliver_scores(
    model: Ref, name: str, suite: Suite, scores: Sequence[Ref], out: Path, store: Store, replace: bool
) -> dict[str, Any]:
    """Write one model's scores into a folder: ``scores.json`` and the samples of each benchmark as parquet.

    Returns:
        What ``scores.json`` holds.
    """
    records = [read_record(ref, store) for ref in scores]
    delivered = Ref("scores", digest_of(sorted(ref.digest for ref in scores)))
    summary = {
        "digest": delivered.digest,
        "model": name,
        "model_digest": model.digest,
        "suite": suite.name,
        "split": records[0]["split"],
        "partial": any(record["partial"] for record in records),
        "dimensions": dimension_scores(scores, suite, store),
        "benchmarks": records,
    }

    def fill(folder: Path) -> None:
        for ref, record in zip(scores, records, strict=True):
            shutil.copyfile(store.folder(ref) / SAMPLES_FILE, folder / f"{record['task']}.parquet")
        (folder / "scores.json").write_text(json.dumps(summary, indent=1))
        manifest = {
            "kind": delivered.kind,
            "digest": delivered.digest,
            "parents": [f"{ref.kind}/{ref.digest}" for ref in scores],
            "files": record_files(folder),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))

    deliver(out, fill, delivered, replace)
    return summary


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


def _inputs(title: str, suite: Suite, entries: Sequence[Entry], interference: Ref, store: Store) -> ReportInputs:
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
        provenance=_provenance(entries, store),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        conditions=_conditions(entries, store),
    )


def _conditions(entries: Sequence[Entry], store: Store) -> dict[str, dict[str, str]]:
    """Benchmark to how it was asked and read; where models differ, each answer with the models that it holds for."""
    told: dict[str, dict[str, dict[str, list[str]]]] = {}
    for entry in entries:
        for ref in entry.scores:
            record = read_record(ref, store)
            for name, say in _CONDITIONS.items():
                names = told.setdefault(record["task"], {}).setdefault(name, {}).setdefault(say(record), [])
                names += [entry.name] if entry.name not in names else []
    return {
        task: {
            name: next(iter(answers))
            if len(answers) == 1
            else "; ".join(f"{answer}: {', '.join(models)}" for answer, models in answers.items())
            for name, answers in conditions.items()
        }
        for task, conditions in told.items()
    }


def _judge(record: Mapping[str, Any]) -> str:
    if record["judge"] is None:
        return "none, by lm-eval"
    return ", ".join(f"{name} {value}" for name, value in record["judge"].items() if value not in (None, ""))


_CONDITIONS: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "metric": lambda record: str(record["metric"]),
    "judge": _judge,
    "few-shot examples": lambda record: str(record["num_fewshot"]),
    "chat template": lambda record: "yes" if record["chat_template"] else "no",
    "BOS": lambda record: str(record["bos"]),
    "version": lambda record: str(record["task_version"]) or "–",
    "partial": lambda record: "yes" if record["partial"] else "no",
    "prompts cut": lambda record: "unknown" if record.get("cut") is None else str(record["cut"]),
}


def _provenance(entries: Sequence[Entry], store: Store) -> dict[str, str]:
    """The machine, the versions, and for every model its artifact and what it took."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{_processor()}"
    found = {"machine": machine} | {name: text for name, text in package_versions().items()}
    several = len({entry.seed for entry in entries}) > 1
    for entry in entries:
        made = sum(store.manifest(ref).seconds for ref in (*entry.scores, *entry.validation))
        found[f"model {entry.name}" + (f", seed {entry.seed}" if several else "")] = (
            f"{entry.model.kind}/{entry.model.digest}, made in {store.manifest(entry.model).seconds:.1f} s, "
            f"evaluated in {made:.1f} s"
        )
    return found


def _processor() -> str:
    """The processor's own name, where the system tells; results of a training depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f", {names[0]}" if names else ""
