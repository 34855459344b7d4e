"""Building steps in a child process."""

from collections.abc import Sequence
from functools import partial

from tasks.apart.call import call_apart
from tasks.steps import Step
from tasks.store import RESUMED, Built, Store
from tasks.usage import note_use, using


def build_apart(steps: Sequence[Step], store: Store) -> list[Built]:
    """Build steps that belong together in one child process; what the store or its mirror has starts none.

    The limit is that of the first step. Waiting for another run that makes the same does not count.

    Raises:
        ProcessError: if the limit passed or the child died; what the child raises passes through.
    """
    here = [store.bring(step.ref) for step in steps]
    lacking = [step for step, found in zip(steps, here, strict=True) if not found]
    made = iter(_call(lacking, store) if lacking else ())
    return [step.build(store) if found else next(made) for step, found in zip(steps, here, strict=True)]


def _call(steps: list[Step], store: Store) -> list[Built]:
    # Before the child does: what it made is in use when it has ended, too.
    with using(store.root):
        for step in steps:
            note_use(store.root, f"{step.ref.kind}/{step.ref.digest}")
    goes_on = any(step.kind in RESUMED for step in steps)
    again = "goes on with the shards that are complete" if goes_on else "takes what is finished from the store"
    what = steps[0].title + (f" and {len(steps) - 1} more" if len(steps) > 1 else "")
    limit = steps[0].timeout_minutes
    return call_apart(what, partial(_build, steps, store), limit and 60 * limit, f"The next run {again}.")


def _build(steps: list[Step], store: Store) -> list[Built]:
    return [step.build(store) for step in steps]
