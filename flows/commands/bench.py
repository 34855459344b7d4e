"""``tripoise bench``: compare methods on a suite as a Prefect flow run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, OutOption, ReplaceOption, StoreOption, answer
from flows.commands.report_flow import run_report_flow
from flows.terminal import bench_text, log_to


def bench(
    file: Annotated[Path, typer.Argument(help="Benchmark file (YAML).")],
    out: OutOption,
    store: StoreOption = None,
    as_json: JsonOption = False,
    replace: ReplaceOption = False,
) -> None:
    """Compare methods on a suite as a Prefect flow run: a leaderboard and a report.

    Uses the Prefect server of PREFECT_API_URL; without one, a temporary server is started and stopped.
    """
    log_to(as_json)
    summary, notes = run_report_flow(file, out, store, replace, _load, _flow)
    answer(summary, as_json, bench_text(summary, notes))


def _load(file: Path) -> Any:
    from flows.parameters import load_bench

    return load_bench(file)


def _flow() -> Callable[[Any], dict[str, Any]]:
    from flows.benchmark import benchmark

    return benchmark
