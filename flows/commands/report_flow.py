"""What the commands share that run a flow whose result is a report."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.options import open_store, prepare_prefect


def run_report_flow(
    file: Path,
    out: Path,
    store: Path | None,
    replace: bool,
    load: Callable[[Path], Any],
    import_flow: Callable[[], Callable[[Any], dict[str, Any]]],
) -> tuple[dict[str, Any], list[str]]:
    """Run a flow by a file and deliver its report.

    Args:
        file: what the user wrote.
        out: folder for the report.
        store: root of the store; None: the default one.
        replace: whether ``out`` may hold something else.
        load: reads and checks the file.
        import_flow: gives the flow; called when Prefect's settings are in place.

    Returns:
        The summary for --json, with the seconds of each phase; and the notes of the report.
    """
    started = time.perf_counter()
    from tasks.deliver import check_replaceable, deliver_artifact

    wanted = load(file)
    opened = open_store(store)
    check_replaceable(out, "report", replace, protected=[opened.root, file])
    os.environ["TRIPOISE_STORE"] = str(opened.root)
    prepare_prefect()
    flow = import_flow()
    imported = time.perf_counter()
    result = flow(wanted)
    report = opened.lookup(result["report"])
    deliver_artifact(report, out, opened, replace)
    ended = time.perf_counter()
    from tasks.reporting import read_report

    delivered = read_report(out)
    summary = {
        "digest": report.digest,
        "report": str((out / "report.html").absolute()),
        "leaderboard": delivered.rows,
        "reused": result["made"] == 0,
        "steps_made": result["made"],
        "steps_reused": result["reused"],
        "seconds": round(ended - started, 2),
        "seconds_imports": round(imported - started, 2),
        "seconds_server_start": round(result["started"] - imported, 2),
        "seconds_steps": round(result["ended"] - result["started"], 2),
    }
    return summary, list(delivered.notes)
