"""``tripoise reevaluate``: evaluate what is new in watched sources."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, OutOption, ReplaceOption, StoreOption, answer, open_store
from flows.terminal import log_to
from tasks.store import MANIFEST


def reevaluate(
    file: Annotated[Path, typer.Argument(help="Watch file (YAML).")],
    out: OutOption,
    approve: Annotated[
        list[str] | None, typer.Option("--approve", help="Accept the scored checkpoint whose digest begins so.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    replace: ReplaceOption = False,
) -> None:
    """Evaluate what is new in watched sources and compare it with what was accepted. Needs no server."""
    started = time.perf_counter()
    log_to(as_json)
    from flows.watch_parameters import load_watch
    from flows.watching import look_again, summarized
    from tasks.deliver import check_replaceable, deliver_artifact
    from tasks.recipes import validated
    from tasks.steps import Direct

    watch = load_watch(file)
    if approve:
        watch = validated(type(watch), watch.model_dump() | {"approve": approve}, f"watch {file.name}")
    run = Direct(open_store(store))
    local = [Path(one.source) for one in watch.sources if "://" not in one.source]
    check_replaceable(out, "report", replace, _earlier_trend(out, watch.name), [run.store.root, file, *local])
    report, found = look_again(watch, run, tell=None)
    # What was in its place is an earlier page of the same watch.
    deliver_artifact(report, out, run.store, replace=True)
    summary = {
        "digest": report.digest,
        "report": str((out / "trend.html").absolute()),
        **summarized(found),
        "reused": not any(one.scores for one in found.recorded),
        "seconds": round(time.perf_counter() - started, 2),
    }
    answer(summary, as_json, _text(summary, found.warnings))


def _earlier_trend(out: Path, watch: str) -> str | None:
    """Digest of the trend of the same watch that a folder holds."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["digest"]) if manifest["identity"].get("watch") == watch else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _text(summary: dict[str, Any], warnings: list[str]) -> str:
    lines = []
    for one in summary["recorded"]:
        scores = "  ".join(f"{d} {s['value']:.3f} ± {s['stderr']:.3f}" for d, s in one["scores"].items())
        lines.append(
            f"{one['watched']}, {one['place']} ({one['digest'][:12]}): {one['verdict']}"
            f"{', accepted' if one['accepted'] else ''}{' (partial)' if one['partial'] else ''}  {scores}".rstrip()
        )
    for event in summary["events"]:
        if "dimension" in (told := event["payload"]):
            lines.append(
                f"  {event['event']}: {told['dimension']} {told['difference']:+.3f} "
                f"[{told['low']:+.3f}, {told['high']:+.3f}], {told['why']}, "
                f"n = {told['n']}{f', {left} left out' if (left := told['left_out']) else ''}"
            )
    lines += [f"{one['watched']}, {one['place']}: left, incomplete: {one['why']}" for one in summary["left"]]
    lines += [f"warning: {one}" for one in warnings]
    return "\n".join([*(lines or ["nothing new"]), f"trend: {summary['report']}"])
