"""Steps: memoized computations as values, and the plainest way to run them.

A flow says which steps there are and in which order. A runner decides how: ``Direct`` calls them in this process,
``tasks.orchestration.AsPrefectTasks`` makes each group a Prefect task run, ``flows.pools.OnPools`` asks GPU workers for
what is missing, ``tasks.plan.Planner`` only asks the store.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from merging_core.digest import digest_of
from tasks.progress import track
from tasks.sources import resolve
from tasks.store import Built, Ref, Store

log = logging.getLogger("tripoise.steps")


@dataclass(frozen=True, slots=True)
class Request:
    """What another machine is asked to run, so that it makes an artifact."""

    deployment: str
    """Such as ``merge/merge``."""
    parameters: Mapping[str, Any]
    """JSON-able; names sources by content or by a path that the other machine has too."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One artifact that can be asked for."""

    kind: str
    """Kind of the artifact."""
    title: str
    """For people: what is done with what."""
    identity: Mapping[str, Any]
    """Everything that determines the bytes."""
    parents: tuple[Ref, ...]
    """Artifacts it is made from."""
    make: Callable[[Path], Mapping[str, Any] | None] = field(repr=False)
    """Writes the files into an empty folder; may return details for the manifest."""
    elsewhere: Request | None = None
    """What makes it on a GPU worker, for a runner that has some."""
    device: str = ""
    """Torch device that its work is done on, or several separated by commas; empty: it is light."""
    timeout_minutes: float | None = None
    """Minutes after which a process that makes it is stopped, > 0; None: never."""
    parts: Callable[[], Sequence["Step"]] = field(default=tuple, repr=False)
    """Independent steps, in whose artifacts, where they exist, a share of its work is done."""

    @property
    def ref(self) -> Ref:
        """The artifact's name, whether or not it exists."""
        return Ref(self.kind, digest_of(self.identity))

    def build(self, store: Store) -> Built:
        """Reuse the artifact or make it."""
        built = store.build(self.kind, self.identity, self.make, self.parents)
        log.info("%s: %s %s in %.1f s", self.title, "reused" if built.reused else "made", built.ref, built.seconds)
        return built


class Runner(Protocol):
    """How steps are run."""

    store: Store

    def resolve(self, sources: Sequence[str]) -> list[Ref]:
        """Pin every source to a checkpoint, independent ones at the same time where that helps; in the given order."""

    def build(self, name: str, title: str, steps: Sequence[Step]) -> list[Ref]:
        """Run steps that belong together, one after the other, as the unit ``name`` with the readable ``title``."""

    def map(self, name: str, groups: Sequence[tuple[str, Sequence[Step]]]) -> list[list[Ref]]:
        """Run groups of independent steps, a title and the steps each; several steps at a time if the runner can."""


class Direct:
    """Run everything here and now, without a server."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.built: list[Built] = []

    def resolve(self, sources: Sequence[str]) -> list[Ref]:
        """See :class:`Runner`."""
        return [self._note(resolve_with_progress(source, self.store)) for source in sources]

    def build(self, name: str, title: str, steps: Sequence[Step]) -> list[Ref]:
        """See :class:`Runner`. In this process, but for steps that have a time limit."""
        if any(step.timeout_minutes for step in steps):
            from tasks.apart import build_apart  # which is made of steps

            return [self._note(built) for built in build_apart(steps, self.store)]
        return [self._note(step.build(self.store)) for step in steps]

    def map(self, name: str, groups: Sequence[tuple[str, Sequence[Step]]]) -> list[list[Ref]]:
        """See :class:`Runner`."""
        return [self.build(name, title, steps) for title, steps in groups]

    def _note(self, built: Built) -> Ref:
        self.built.append(built)
        return built.ref


def resolve_with_progress(source: str, store: Store) -> Built:
    """Pin one source and show how far hashing, downloading or training is."""
    with track(f"resolve {source}", "items" if source.startswith("mini3h:") else "bytes") as progress:
        return resolve(source, store, progress=progress)
