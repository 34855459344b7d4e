"""The flow ``reevaluate``: what is new in watched sources is scored, compared with what is accepted, and told."""

import re
from datetime import UTC, datetime
from typing import Any, Final

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.events import Event as PrefectEvent
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed

from flows.pools import runner
from flows.watch_parameters import Watch
from flows.watching import look_again, summarized
from tasks.orchestration import TASK_RUNNER
from tasks.store import Store
from tasks.watch.events import Event
from tasks.watch.records import Findings

_MODEL: Final = "tripoise.model."


def _run_name() -> str:
    watch = Watch.model_validate(flow_run.parameters["watch"])
    return f"{watch.name} · {', '.join(one.name for one in watch.sources)}"


@flow(name="reevaluate", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def reevaluate(watch: Watch, published: str = "") -> Any:
    """You get the scores of every checkpoint that is new, events where they rose or fell, and a page of the trend.

    Ends as Completed; under the name ``Warnings`` where a source could not be looked at or a checkpoint not be scored,
    and as Failed where no source could. Runs that were due before this one started are cancelled: it stands for them.

    Args:
        watch: What is watched, and how models are evaluated.
        published: Name of a source of which somebody says that all has arrived, so that nothing of it needs to settle;
            or the resource id of such an event, tripoise.model.NAME.
    """
    covered = _stand_for_due_runs()
    run = runner(Store.default())
    report, found = look_again(watch, run, _tell, published.removeprefix(_MODEL))
    page = run.store.folder(report) / "trend.html"
    create_markdown_artifact(
        key=_artifact_key(watch.name), markdown=_markdown(watch, found, page.as_uri()), description=watch.name
    )
    summary = {"report": f"{report.kind}/{report.digest}", "covered": covered} | summarized(found)
    summary |= {"made": run.num_made, "reused": run.num_reused}
    for warning in found.warnings:
        get_run_logger().warning("%s", warning)
    if found.warnings:
        return Completed(name="Warnings", message=" ".join(found.warnings), data=summary)
    return summary


def _artifact_key(watch: str) -> str:
    """Of the trend of a watch: keys are lower case, with dashes."""
    return "trend-" + re.sub("[^a-z0-9]+", "-", watch.lower()).strip("-")


def _tell(event: Event) -> None:
    """Tell the Prefect server, whose automations act on it; an error unless it says that it has the event.

    Not by Prefect's own ``emit_event``: that returns when the event waits in a queue of this process.
    """
    resource = {
        "prefect.resource.id": f"{_MODEL}{event.model}",
        "prefect.resource.name": event.model,
        "tripoise.watch": event.payload["watch"],
    }
    if dimension := event.payload.get("dimension"):
        resource["tripoise.dimension"] = dimension
    run = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}
    told = PrefectEvent.model_validate(
        {
            **{"id": event.id, "occurred": datetime.now(UTC), "event": event.name},
            **{"resource": resource, "related": [run], "payload": event.payload},
        }
    )
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[told.model_dump(mode="json")])


def _stand_for_due_runs() -> int:
    """Cancel the runs of this deployment that were due before now and still wait, if they ask for no more.

    After an outage, or behind a long run, many wait; this one looks at the sources later than they were to.
    """
    if not deployment.id:
        return 0
    waiting = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": [deployment.id]},
            "state": {"type": {"any_": [StateType.SCHEDULED]}},
            "expected_start_time": {"before_": datetime.now(UTC)},
        }
    )
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(flow_run.id)
        others = [
            one
            for one in client.read_flow_runs(flow_run_filter=waiting)
            if one.parameters["watch"] == own.parameters["watch"]
            and one.parameters.get("published", "") in ("", own.parameters.get("published", ""))
        ]
        for other in others:
            message = f"Run {own.name!r} started later than this one was due, and looks at the same sources."
            client.set_flow_run_state(other.id, Cancelled(message=message))
    return len(others)


def _markdown(watch: Watch, found: Findings, page: str) -> str:
    rows = [
        f"| {one.watched} | {one.place} | {one.verdict}{', accepted' if one.accepted else ''} | "
        + " | ".join(f"{score['value']:.3f} ± {score['stderr']:.3f}" for score in one.scores.values())
        + " |"
        for one in found.recorded
        if one.scores
    ]
    table = ["| source | checkpoint | verdict | helpful | honest | harmless | mean |", "| --- " * 7 + "|", *rows]
    left = [f"- {one['watched']}, {one['place']}: left, incomplete: {one['why']}" for one in found.left]
    lines = [f"# {watch.name}", "", *(table if rows else ["Nothing new."]), "", *left]
    return "\n".join([*lines, *(f"- {one}" for one in found.warnings), "", f"Trend: [{page}]({page})"])
