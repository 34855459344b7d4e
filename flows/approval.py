"""Approval: a run waits until somebody has looked at the report, and publishes what is promoted."""

from typing import Any, Final, Literal

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from tasks.publish import publish
from tasks.store import Ref, Store

WAIT_SECONDS: Final = 7 * 24 * 3600
"""After a week without a decision the run fails; started again it has everything and asks again."""


class Decision(RunInput):
    """What becomes of a merged model."""

    decision: Literal["promote", "reject"] = Field(
        title="Decision", description="Promote publishes the model; reject leaves it in the store."
    )
    note: str = Field(default="", title="Note", description="Why; kept with the decision.", max_length=2000)


def approved(model: Ref, target: str) -> bool:
    """Wait for a decision, and keep it as an artifact; the worker's process waits too, so let it be a light one."""
    given = pause_flow_run(wait_for_input=Decision, timeout=WAIT_SECONDS, poll_interval=2, key="approval")
    create_markdown_artifact(
        key="decision",
        markdown=f"**{given.decision}** `{model}` to `{target}`\n\n{given.note}",
        description=given.decision,
    )
    get_run_logger().info("%s: %s. %s", model, given.decision, given.note)
    return given.decision == "promote"


@task(name="publish model", task_run_name="publish to {target}", cache_policy=NO_CACHE, persist_result=False)
def publish_model(model: Ref, target: str, store: Store) -> str:
    """Write a model to where others find it; what is there already is not sent again. Gives the pinned place."""
    done = publish(model, target, store)
    create_markdown_artifact(
        key="publication",
        markdown=f"`{model}` {'is' if done.reused else 'was written'} at `{done.origin}`",
        description=done.origin,
    )
    return done.origin


def published(model: Ref, target: str, ask: bool, store: Store) -> dict[str, Any]:
    """What a flow says of publishing: nothing without a target."""
    if not target:
        return {}
    if ask and not approved(model, target):
        return {"published": "rejected"}
    return {"published": publish_model(model, target, store)}
