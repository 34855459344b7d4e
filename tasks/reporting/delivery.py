"""One model's scores as a folder of their own."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging_core.digest import digest_of
from tasks.deliver import deliver
from tasks.reporting.dimensions import dimension_scores
from tasks.scores import SAMPLES_FILE, read_record
from tasks.store import MANIFEST, Ref, Store, record_files
from tasks.suite import Suite


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
