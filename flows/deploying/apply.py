"""Applying: a server is made to have what is declared, however often this runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema

from flows.client import no_answer, no_server
from flows.deploying.alerts import alert_automations
from flows.deploying.declared import TAG, Declared, Deployment, Pool
from merging_core.errors import CheckpointError, RecipeError

GPU_SLOTS: Final = "tripoise-gpu"
"""The global concurrency limit whose slots GPU flows hold; the pools' templates name it."""
_PAGE: Final = 200


@contextmanager
def server() -> Iterator[SyncPrefectClient]:
    """A client of the server that the settings name.

    Raises:
        RecipeError: if no server is named.
        CheckpointError: if it does not answer, or refuses the password.
    """
    url = get_current_settings().api.url
    if not url:
        raise no_server()
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPStatusError as error:
        refused = error.response.status_code == httpx.codes.UNAUTHORIZED
        remedy = "Set PREFECT_API_AUTH_STRING=user:password." if refused else "See its log."
        said = " ".join(error.response.text.split())[:300]
        raise CheckpointError(f"{url}: answered {error.response.status_code}: {said} {remedy}") from error
    except httpx.TransportError as error:
        raise no_answer(url, error) from error


def apply(declared: Declared, client: SyncPrefectClient, gpus: int | None = None) -> list[str]:
    """Create, update and remove until the server has what is declared; runs and what others made stay.

    Args:
        declared: all that carries our tag afterwards.
        client: of the server.
        gpus: slots for GPU runs over all workers; None: as the server has it, else 1.

    Returns:
        A line for each thing that was applied or removed.
    """
    done = [_apply_pool(pool, client) for pool in declared.pools]
    done.append(_apply_slots(gpus, client))
    automations = list(declared.automations)
    if declared.alerts:
        told, line = alert_automations(declared.alerts, client)
        automations += told
        done.append(line)
    kept = set[UUID]()
    for one in declared.deployments:
        place = _apply_deployment(one, client)
        kept.add(place)
        done.append(f"deployment {one.name}")
        automations += _triggered(one, place)
    done += _apply_automations(automations, client)
    for old in _ours(client):
        if old.id not in kept:
            client.delete_deployment(old.id)
            done.append(f"removed deployment {old.name}")
    return done


def limit_light_runs(limit: int, client: SyncPrefectClient) -> None:
    """Set how many runs of the cpu pool may be under way at the same time, over all its workers."""
    client.update_work_pool("tripoise-cpu", WorkPoolUpdate(concurrency_limit=limit))


def _apply_pool(pool: Pool, client: SyncPrefectClient) -> str:
    try:
        there = client.read_work_pool(pool.name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=pool.name, type=pool.type, base_job_template=pool.template))
        return f"work pool {pool.name} ({pool.type}), new"
    if there.type != pool.type:
        raise RecipeError(
            f"work pool {pool.name}: runs on {there.type}, the profile wants {pool.type}, and a pool keeps its type. "
            f"When no run needs it any more: prefect work-pool delete {pool.name}. Then deploy again."
        )
    client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=pool.template))
    return f"work pool {pool.name} ({pool.type})"


def _apply_slots(gpus: int | None, client: SyncPrefectClient) -> str:
    if gpus is None:
        try:
            there = client.read_global_concurrency_limit_by_name(GPU_SLOTS)
            return f"concurrency limit {GPU_SLOTS}, as it is: {there.limit}"
        except ObjectNotFound:
            gpus = 1
    client.upsert_global_concurrency_limit_by_name(GPU_SLOTS, gpus)
    return f"concurrency limit {GPU_SLOTS}: {gpus}"


def _apply_deployment(one: Deployment, client: SyncPrefectClient) -> UUID:
    """Prefect replaces a deployment of the same name, with all of its schedules."""
    flow = _flow(one)
    limit = one.concurrency_limit
    return client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=one.name,
        version=version("tripoise"),
        description=one.description,
        tags=sorted({TAG, *one.tags}),
        entrypoint=one.entrypoint,
        pull_steps=[],
        parameters=one.parameters,
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        work_pool_name=one.work_pool.name,
        work_queue_name=one.work_pool.work_queue_name,
        job_variables=one.work_pool.job_variables,
        concurrency_limit=limit.limit if limit else None,
        concurrency_options=limit,
        schedules=[
            DeploymentScheduleCreate(
                schedule=each.schedule(), active=each.active, slug=each.slug, parameters=each.parameters
            )
            for each in one.schedules
        ],
    )


def _flow(one: Deployment) -> Flow[..., object]:
    try:
        return load_flow_from_entrypoint(one.entrypoint, use_placeholder_flow=False)
    except Exception as error:
        raise RecipeError(f"deployment {one.name}: {one.entrypoint} cannot be loaded ({error}).") from error


def _triggered(one: Deployment, deployment: UUID) -> list[AutomationCore]:
    """The automations that start a deployment."""
    found = []
    for number, trigger in enumerate(one.triggers, start=1):
        trigger.set_deployment_id(deployment)
        trigger.name = trigger.name or f"{TAG}: {one.name} {number}"
        found.append(trigger.as_automation())
    return found


def _apply_automations(automations: list[AutomationCore], client: SyncPrefectClient) -> list[str]:
    """Automations are known by name; those with our tag that are not among them go.

    One that is as declared is left alone: an update would make it forget the runs whose silence it is counting.
    """
    ours = {one.name: one for one in client.read_automations() if TAG in one.tags}
    done = []
    for one in automations:
        tagged = one.model_copy(update={"tags": sorted({TAG, *one.tags})})
        if (there := ours.pop(one.name, None)) is None:
            client.create_automation(tagged)
        elif _compared(there) != _compared(tagged):
            # An update may not name the owner, and what counts as unset would not be sent: the type of an action.
            rest = AutomationCore.model_validate(tagged.model_dump(exclude={"owner_resource"}))
            client.update_automation(there.id, rest)
        done.append(f"automation {one.name}")
    for name, old in ours.items():
        client.delete_automation(old.id)
        done.append(f"removed automation {name}")
    return done


def _compared(one: AutomationCore) -> dict[str, Any]:
    return one.model_dump(exclude={"id", "owner_resource"})


def _ours(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Every deployment with our tag."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(deployment_filter=tagged, limit=_PAGE, offset=len(found)):
        found += page
    return found
