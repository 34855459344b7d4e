"""What is remembered between two looks: which checkpoints are accepted, and the history of all that were scored.

One JSON file in the store, ``watches/<name>/state.json``, written whole by a rename. Garbage collection keeps the
scores of accepted checkpoints, so that the next comparison has its other half.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from merging_core.errors import CheckpointError, RecipeError
from tasks.store import Ref, Store, flush
from tasks.watch.events import Event

STATE_VERSION: Final = 1
_FOLDER: Final = "watches"
Verdict = Literal["first", "unjudged", "unchanged", "improved", "regressed", "copy", "rescored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One line of the history: a checkpoint that was found new in a source."""

    time: str
    """When it was recorded, ISO 8601 in UTC."""
    written: str = ""
    """When it was last written to, as far as its source tells."""
    watched: str
    """Name of the source, as the watch calls it."""
    place: str
    """Where in the source."""
    origin: str
    """What was resolved."""
    digest: str
    """Of the checkpoint."""
    verdict: Verdict
    """``regressed`` if any H did, ``improved`` if one or more did and none regressed. ``first``: accepted, as nothing
    was before; ``unjudged``: there is nothing accepted that it can be held against; ``copy``: its content was scored
    before in this source; ``rescored``: the accepted one again, since suite or settings changed."""
    accepted: bool = False
    """Whether it became the accepted one when it was recorded."""
    caution: str = ""
    """A sentence on what else than the checkpoint may have changed its scores; mostly empty."""
    against: str = ""
    """Digest of the checkpoint that it was compared with."""
    measure: str = ""
    """Digest of what was asked: only scores of one measure can be compared."""
    partial: bool = False
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each H and the mean: ``value``, ``stderr``, ``n``."""
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each H and the mean to its :class:`tasks.watch.verdict.Change`."""
    refs: list[str] = field(default_factory=list)
    """Digests of its scores."""


@dataclass(slots=True)
class State:
    """What a watch remembers; change it only while :func:`remembered` lends it."""

    watch: str
    """Its name."""
    accepted: dict[str, str] = field(default_factory=dict)
    """Source to the digest of its accepted checkpoint."""
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    """Source to its places' stamps as they were when they were last scored: they need no second look."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """Source to the time since when it cannot be looked at."""
    history: list[Seen] = field(default_factory=list)
    """Oldest first."""
    untold: list[Event] = field(default_factory=list)
    """What was found and nobody was told of yet, oldest first: saved with the finding, removed once it is told."""

    def newest(self, watched: str, place: str) -> Seen | None:
        """The last line of a place that tells what lay there."""
        lines = [one for one in self.history if (one.watched, one.place) == (watched, place)]
        return next((one for one in reversed(lines) if one.verdict != "rescored"), None)

    def scored(self, watched: str, digest: str, measure: str = "") -> Seen | None:
        """The newest line of a source with scores of this content, of any measure or of one."""
        lines = [one for one in self.history if (one.watched, one.digest) == (watched, digest) and one.scores]
        return next((one for one in reversed(lines) if measure in ("", one.measure)), None)

    def approve(self, start: str) -> None:
        """Accept the checkpoint whose digest begins so, in every source where it was scored.

        Raises:
            RecipeError: if no or several scored checkpoints do.
        """
        found = {one.digest for one in self.history if one.scores and one.digest.startswith(start)}
        if len(found) != 1:
            what = "no scored checkpoint matches" if not found else f"{len(found)} scored checkpoints match"
            raise RecipeError(f"approve {start!r}: {what}. Name one as the trend page shows it.")
        [digest] = found
        self.accepted |= {one.watched: digest for one in self.history if one.digest == digest and one.scores}

    def refs(self, watched: str) -> list[str]:
        """Digests of the scores of a source's accepted checkpoint."""
        digest = self.accepted.get(watched, "")
        return [ref for one in self.history if (one.watched, one.digest) == (watched, digest) for ref in one.refs]


@contextmanager
def remembered(watch: str, store: Store) -> Iterator[State]:
    """Lend what a watch remembers; nobody else has it meanwhile, in this process or another of this machine.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    path = _path(watch, store)
    with store.lock(f"watch-{watch}"):
        yield _read(path) if path.exists() else State(watch)


def save(state: State, store: Store) -> None:
    """Write what :func:`remembered` lent; after a crash the last that was written whole counts."""
    path = _path(state.watch, store)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": STATE_VERSION} | asdict(state), indent=1), encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def accepted_scores(store: Store) -> set[Ref]:
    """Scores of the accepted checkpoints of every watch.

    Raises:
        CheckpointError: if what one remembers cannot be read: which scores it needs is not known then.
    """
    states = [_read(path) for path in sorted((store.root / _FOLDER).glob("*/state.json"))]
    return {Ref("scores", digest) for one in states for name in one.accepted for digest in one.refs(name)}


def now() -> str:
    """The time, as histories write it."""
    return text(datetime.now(UTC))


def text(time: datetime) -> str:
    """A time, as histories write it: ISO 8601 with milliseconds."""
    return time.isoformat(timespec="milliseconds")


def _path(watch: str, store: Store) -> Path:
    return store.root / _FOLDER / watch / "state.json"


def _read(path: Path) -> State:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain.pop("version") != STATE_VERSION:
            raise ValueError("it is of another version")
        history = [Seen(**one) for one in plain["history"]]
        return State(**plain | {"history": history, "untold": [Event(**one) for one in plain.get("untold", ())]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Put a backup in its place, or remove it to begin anew."
        ) from error
