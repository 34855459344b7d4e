"""``tripoise sweep``: try many recipes on validation, report the best on test."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, OutOption, ReplaceOption, StoreOption, answer
from flows.commands.report_flow import run_report_flow
from flows.terminal import bench_text, log_to


def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file (YAML): a recipe, and which of its settings are varied.")],
    out: OutOption,
    store: StoreOption = None,
    as_json: JsonOption = False,
    replace: ReplaceOption = False,
) -> None:
    """Search recipe settings on validation, then report the chosen ones on test, as a Prefect flow run.

    Stopped and run again it goes on. Uses the Prefect server of PREFECT_API_URL; without one, a temporary server is
    started and stopped.
    """
    log_to(as_json)
    summary, notes = run_report_flow(file, out, store, replace, _load, _flow)
    from tasks.sweep.files import read_trials

    trials = read_trials(out)["trials"]
    states = {state: sum(one["state"] == state for one in trials) for state in ("complete", "pruned", "refused")}
    summary |= {
        "pareto": str((out / "pareto.html").absolute()),
        "trials": states,
        "pareto_set": [one["trial"] for one in trials if one["pareto"]],
        "chosen": {str(one["trial"]): one["chosen"] for one in trials if one["chosen"]},
    }
    told = ", ".join(f"{number} {state}" for state, number in states.items())
    chosen = "; ".join(f"trial {number}: {why}" for number, why in summary["chosen"].items())
    notes += [
        f"{len(trials)} trials ({told}). Chosen on validation: {chosen}.",
        f"all trials: {summary['pareto']}",
    ]
    answer(summary, as_json, bench_text(summary, notes))


def _load(file: Path) -> Any:
    from flows.sweep_parameters import load_sweep

    return load_sweep(file)


def _flow() -> Callable[[Any], dict[str, Any]]:
    from flows.sweep import sweep as flow

    return flow
