"""Approval: a run waits until somebody has looked at the report, and publishes what is promoted."""

from typing import Any, Final, Literal

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.input.actions import filter_flow_run_input
from prefect.runtime import flow_run
from pydantic import Field

from tasks.publish import publish
from tasks.store import Ref, Store

WAIT_SECONDS: Final = 7 * 24 * 3600
"""After a week without a decision the run fails; started again it has everything and asks again."""
_KEY: Final = "approval"
_MOST_INPUTS: Final = 200


class Decision(RunInput):
    """What becomes of a merged model."""

    decision: Literal["promote", "reject"] = Field(
        title="Decision", description="Promote publishes the model; reject leaves it in the store."
    )
    note: str = Field(default="", title="Note", description="Why; kept with the decision.", max_length=2000)


def decision() -> Decision | None:
    """What this run has been told, if it has asked and was answered: it is asked once, however often it starts."""
    # Within a flow that is not asynchronous it is no coroutine.
    given: Any = filter_flow_run_input(f"suspended-{_KEY}", limit=_MOST_INPUTS)
    return next((Decision.load_from_flow_run_input(one) for one in given if one.key.endswith("-response")), None)


def approved(model: Ref, target: str) -> bool:
    """Whether the model may be published, as was decided; kept as an artifact.

    Without a decision the run ends here, its process too, and starts anew when there is one; it needs a deployment.
    A blocking pause would not do: the server takes the deployment's slot from a paused run, and its process crashes.
    """
    # A run that nobody answered may start again, and Prefect lets a key be used once in a run.
    key = f"{_KEY}-{flow_run.run_count}"
    given = decision() or suspend_flow_run(wait_for_input=Decision, timeout=WAIT_SECONDS, key=key)
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
