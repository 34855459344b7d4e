"""Which machine runs a step: here, or a GPU worker that is asked through a deployment."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Final

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment

from merging_core.errors import CheckpointError
from tasks.orchestration import AsPrefectTasks
from tasks.steps import Request, Step
from tasks.store import Ref, Store

STEPS: Final = "TRIPOISE_GPU_STEPS"
"""Set to ``deployments`` where parent flows run, so that merges and evaluations go to the GPU pool."""
SLOTS: Final = "TRIPOISE_GPU_SLOTS"
"""Names the global concurrency limit whose slots GPU flows hold."""
_LEASE_SECONDS: Final = 60.0


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
        refs = super().build(name, title, steps)
        if made:  # of this run, though not in this process: to the store it looks like reuse
            self.num_made, self.num_reused = self.num_made + 1, self.num_reused - 1
        return refs


def _make_elsewhere(step: Step, request: Request, store: Store) -> None:
    key = _free_key(step.ref)
    run: FlowRun = run_deployment(  # type: ignore[assignment]
        request.deployment,
        parameters=dict(request.parameters),
        timeout=None,
        idempotency_key=key,
        tags=["step"],
        as_subflow=True,
    )
    if store.bring(step.ref):
        return
    state = run.state
    said = f"{state.name}: {' '.join((state.message or '').split())}" if state else "no state"
    if state is None or not state.is_completed():
        raise CheckpointError(f"{step.title}: run {run.name!r} of {request.deployment} ended as {said}. See its log.")
    mirror = f"the mirror {store.mirror}" if store.mirror else "no mirror is set (TRIPOISE_MIRROR)"
    raise CheckpointError(
        f"{step.title}: run {run.name!r} of {request.deployment} completed, but {step.ref} is not in the store "
        f"{store.root} and {mirror}. Either its worker has another store, or another version of Tripoise."
    )


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
