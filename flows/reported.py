"""How a flow that ends in a report runs and what it returns."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

from flows.pools import runner
from flows.shown import completed
from tasks.orchestration import publish
from tasks.steps import Runner
from tasks.store import Ref, Store


def reported(compose: Callable[[Runner], Ref]) -> dict[str, Any]:
    """Run what makes a report as Prefect task runs, and show the report in the UI.

    Returns:
        The ``report`` as kind/digest, how many steps were ``made`` and ``reused``, and when the steps ``started`` and
        ``ended`` by the clock of :func:`time.perf_counter` of this process.
    """
    started = perf_counter()
    run = runner(Store.default())
    report = compose(run)
    publish(report, run.store)
    return completed(
        report=f"{report.kind}/{report.digest}",
        made=run.num_made,
        reused=run.num_reused,
        started=started,
        ended=perf_counter(),
    )
