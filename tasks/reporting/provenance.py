"""Where the numbers of a report come from: how each benchmark was asked, on which machine, by which versions."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tasks.reporting.entries import Entry
from tasks.scores import read_record
from tasks.store import Store, package_versions


def conditions(entries: Sequence[Entry], store: Store) -> dict[str, dict[str, str]]:
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
            for name, answers in of.items()
        }
        for task, of in told.items()
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


def provenance(entries: Sequence[Entry], store: Store) -> dict[str, str]:
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
