"""What goes into a look at watched sources, and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tasks.store import Ref, Store
from tasks.suite import Suite
from tasks.watch.events import Event
from tasks.watch.state import Seen

Acceptance = Literal["automatic-if-not-worse", "never"]


@dataclass(frozen=True, slots=True)
class Watched:
    """A source under the name by which events and reports call its model."""

    name: str
    source: str
    published: bool = False
    """Somebody says that all of it has arrived: nothing needs to settle."""


@dataclass(frozen=True, slots=True)
class Terms:
    """When a checkpoint is looked at, when it counts as worse, and when it becomes the accepted one."""

    accept: Acceptance
    tolerance: float | None
    settle_s: float


@dataclass(frozen=True, slots=True)
class Laboratory:
    """What a look needs from the run that it is a part of."""

    resolve: Callable[[str], Ref]
    scores: Callable[[Ref, str], list[Ref]]
    """Scores a checkpoint under a title."""
    suite: Suite
    store: Store


@dataclass(slots=True)
class Findings:
    """What one look found."""

    recorded: list[Seen] = field(default_factory=list)
    left: list[dict[str, str]] = field(default_factory=list)
    """Checkpoints that are not complete yet: ``watched``, ``place``, ``why``."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """Checkpoints that could not be scored or compared, the same."""
    unreachable: list[dict[str, str]] = field(default_factory=list)
    """Sources that could not be looked at: ``watched``, ``why``."""
    events: list[Event] = field(default_factory=list)
    """Of this look, told or not."""
    untold: str = ""
    """Why events could not be told; empty if all were, or none was to be."""

    @property
    def warnings(self) -> list[str]:
        """A sentence for everything that needs somebody's attention."""
        found = [f"{one['watched']}: {one['why']}" for one in self.unreachable]
        found += [f"{one['watched']}, {one['place']}: {one['why']}" for one in self.failed]
        found += [f"{one.watched}, {one.place}: {one.caution}" for one in self.recorded if one.caution]
        return found + ([self.untold] if self.untold else [])
