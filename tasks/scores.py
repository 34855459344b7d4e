"""Scores on disk: every sample as parquet, the aggregate with standard error and count as JSON."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from merging_core.digest import digest_of
from merging_core.errors import CheckpointError
from tasks.sources.local import content_files
from tasks.store import Manifest, Ref, Store
from tasks.tables import read_rows, write_rows

SAMPLES_FILE: Final = "samples.parquet"
SCORE_FILE: Final = "score.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, what the model said, and what it was worth."""

    id: str
    """The same for every model: position and content of the document."""
    prompt: str
    target: str
    response: str
    value: float | None
    """The metric, in [0, 1]; None where a judge's reply could not be read."""
    verdict: str = ""
    """What a judge decided; empty without a judge."""
    rationale: str = ""
    """Why, in the judge's words."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How one benchmark was put to one model: what a reader must know to trust its score."""

    task: str
    split: str
    partial: bool
    """Whether a limit left samples out."""
    num_fewshot: int
    """Examples that were really in the prompt."""
    task_version: str
    bos: str
    """Whether prompts really began with the BOS token: yes, no, twice or unknown."""
    chat_template: bool
    """Whether prompts were wrapped in the chat template."""
    has_chat_template: bool | None = None
    """Whether the model brings a chat template, used or not; None: unknown. A merge that has none although its base
    has one has lost it."""
    held_out: float = 0.0
    """Share of the documents that is set apart for validation, and not in this test split."""
    cut: int | None = None
    """Documents whose prompt was too long for the model and lost its beginning; None: unknown."""
    samples: int = 1
    """Responses to every prompt."""
    temperature: float = 0.0
    """Of the sampling; 0: the likeliest token each time."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One model on one benchmark."""

    asked: Asked
    metric: str
    samples: tuple[Sample, ...]
    judge: Mapping[str, Any] | None = None
    """Who decided the verdicts: kind, model, prompt version; None where lm-eval's own metric is read."""

    @property
    def values(self) -> list[float]:
        """The metric of every sample that has one."""
        return [sample.value for sample in self.samples if sample.value is not None]

    @property
    def value(self) -> float:
        """Mean over the samples that have a value; NaN if none has."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean, from the sample variance; NaN for fewer than two values."""
        if len(self.values) < 2:
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def record(self) -> dict[str, Any]:
        """Everything but the samples, JSON-able."""
        return {
            **asdict(self.asked),
            "metric": self.metric,
            "judge": None if self.judge is None else dict(self.judge),
            "value": None if math.isnan(self.value) else self.value,
            "stderr": None if math.isnan(self.stderr) else self.stderr,
            "n": len(self.values),
            "unparsed": len(self.samples) - len(self.values),
        }


def write_scores(scored: Scored, out: Path) -> None:
    """Write samples and aggregate into a folder."""
    write_rows([asdict(sample) for sample in scored.samples], out / SAMPLES_FILE)
    (out / SCORE_FILE).write_text(json.dumps(scored.record(), indent=1, sort_keys=True))


def read_record(ref: Ref, store: Store) -> dict[str, Any]:
    """The aggregate of one benchmark, as :meth:`Scored.record` gives it."""
    record: dict[str, Any] = json.loads((store.folder(ref) / SCORE_FILE).read_text())
    return record


def scores_of(model: Ref, store: Store) -> list[dict[str, Any]]:
    """The aggregates of all scores of a model in the store, each with the name of its ``suite``.

    A delivered model that was evaluated as a folder is the same model: its content files are.
    """
    files = store.manifest(model).files
    content = {path.name: files[path.name]["sha256"] for path in content_files(store.folder(model), str(model))}
    same = {model.digest, digest_of({"files": content})}
    found = []
    for ref in store.refs("scores"):
        with suppress(CheckpointError):  # a damaged record is the business of `tripoise store verify`
            manifest = store.manifest(ref)
            if _model_of(manifest, store) in same:
                found.append(manifest.details)
    return found


def _model_of(scores: Manifest, store: Store) -> Any:
    """Digest of the model that was scored; verdicts know it from the generations that they judge."""
    generations = scores.identity.get("generations")
    return (store.manifest(Ref("generations", generations)) if generations else scores).identity.get("model")


def read_values(refs: Sequence[Ref], store: Store) -> dict[str, dict[str, float]]:
    """Benchmark to sample id to metric, over several scores of one model."""
    values = {}
    for ref in refs:
        rows = read_rows(store.folder(ref) / SAMPLES_FILE, ["id", "value"])
        found = {row["id"]: row["value"] for row in rows}
        values[read_record(ref, store)["task"]] = found
        if len(found) != len(rows):
            raise CheckpointError(f"{ref}: sample ids repeat. Remove the artifact and evaluate again.")
    return values
