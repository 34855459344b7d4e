"""Which machine runs a step: here, or a GPU worker that is asked through a deployment."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment
from prefect.runtime import flow_run

from flows.client import CRASH_GRACE_SECONDS
from merging_core.errors import CheckpointError
from tasks.orchestration import AsPrefectTasks
from tasks.steps import Request, Step
from tasks.store import Ref, Store

STEPS: Final = "TRIPOISE_GPU_STEPS"
"""Set to ``deployments`` where parent flows run, so that merges and evaluations go to the GPU pool."""
SLOTS: Final = "TRIPOISE_GPU_SLOTS"
"""Names the global concurrency limit whose slots GPU flows hold."""
_LEASE_SECONDS: Final = 60.0
_MOST_ASKED: Final = 3
_POLL_SECONDS: Final = 1.0


def runner(store: Store) -> AsPrefectTasks:
    """How a parent flow runs its steps: in its own process, or, where the environment says so, on the GPU pool."""
    return OnPools(store) if os.environ.get(STEPS) == "deployments" else AsPrefectTasks(store)


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the limit that the environment names; where it names none, nothing is held.

    The slot is leased: it is free again a minute after its holder died. A limit that does not exist is an error.
    """
    if not (name := os.environ.get(SLOTS)):
        yield
        return
    with concurrency(name, occupy=1, strict=True, lease_duration=_LEASE_SECONDS):
        yield


class OnPools(AsPrefectTasks):
    """Ask a GPU worker for what the store lacks, wait, and take it from the store or its mirror."""

    def build(self, name: str, title: str, steps: Sequence[Step]) -> list[Ref]:
        """See :class:`tasks.steps.Runner`.

        Raises:
            CheckpointError: if the other run ended and the artifact is not here.
        """
        made = False
        for step in steps:
            if step.elsewhere and not self.store.bring(step.ref):
                _make_elsewhere(step, step.elsewhere, self.store)
                made = True
        return self.build_group(name, title, steps, begun=made)

    def map(self, name: str, groups: Sequence[tuple[str, Sequence[Step]]]) -> list[list[Ref]]:
        """See :class:`tasks.steps.Runner`. Whoever is asked decides what runs at the same time there."""
        return [self.build(name, title, steps) for title, steps in groups]


def _make_elsewhere(step: Step, request: Request, store: Store) -> None:
    for _ in range(_MOST_ASKED):
        run: FlowRun = run_deployment(  # type: ignore[assignment]
            request.deployment,
            parameters=dict(request.parameters),
            timeout=None,
            idempotency_key=_free_key(step.ref),
            tags=["step"],
            as_subflow=True,
        )
        if store.bring(step.ref):
            return
        state = run.state
        # Another parent that wanted the same may have been cancelled with it; or it was lost and is started again.
        if state is None or not (_cancelled_alone(state) or _starts_again(run)):
            break
    said = f"{state.name}: {' '.join((state.message or '').split())}" if state else "no state"
    if state is None or not state.is_completed():
        raise CheckpointError(f"{step.title}: run {run.name!r} of {request.deployment} ended as {said}. See its log.")
    mirror = f"the mirror {store.mirror}" if store.mirror else "no mirror is set (TRIPOISE_MIRROR)"
    raise CheckpointError(
        f"{step.title}: run {run.name!r} of {request.deployment} completed, but {step.ref} is not in the store "
        f"{store.root} and {mirror}. Either its worker has another store, or another version of Tripoise."
    )


def _cancelled_alone(state: State[Any]) -> bool:
    """Whether a run was cancelled and this one, which asked for it, was not."""
    if not state.is_cancelled():
        return False
    with get_client(sync_client=True) as client:
        parent = client.read_flow_run(UUID(flow_run.id)).state
    return parent is not None and parent.is_running()


def _starts_again(run: FlowRun) -> bool:
    """Whether a crashed run is put back into the queue within the grace time, as an automation does with a lost one."""
    if not (run.state and run.state.is_crashed()):
        return False
    get_run_logger().warning("run %r crashed; waiting %.0f s for it to start again", run.name, CRASH_GRACE_SECONDS)
    deadline = time.monotonic() + CRASH_GRACE_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            state = client.read_flow_run(run.id).state
            if not (state and state.is_crashed()):
                return True
    return False


def _free_key(ref: Ref) -> str:
    """The key of a run that makes ``ref``: that of one still under way, else one that no run has yet.

    Two parents that want the same artifact wait for one run. A run that ended has left nothing here, or nobody asked.
    """
    base = f"{ref.kind}-{ref.digest}"
    with get_client(sync_client=True) as client:
        for number in count():
            key = f"{base}-{number}" if number else base
            same = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
            runs = client.read_flow_runs(flow_run_filter=same)
            if not all(run.state and run.state.is_final() for run in runs) or not runs:
                return key
    raise AssertionError("count() ends never")
