"""One look at all watched sources: what is new by content is scored, compared with what is accepted, and recorded."""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from merging_core.digest import digest_of
from merging_core.errors import CheckpointError, MergeError
from tasks.comparison import DIMENSIONS
from tasks.store import Ref, Store
from tasks.suite import Suite
from tasks.watch.places import Place, look
from tasks.watch.state import Seen, State, Verdict, save
from tasks.watch.verdict import Change, changes, measured

Acceptance = Literal["automatic-if-not-worse", "never"]
REGRESSED: Final = "tripoise.score.regressed"
IMPROVED: Final = "tripoise.score.improved"
UNREACHABLE: Final = "tripoise.source.unreachable"

log = logging.getLogger("tripoise.watch")


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


@dataclass(frozen=True, slots=True)
class Event:
    """Something that others may act on."""

    name: str
    model: str
    """Name of the source."""
    payload: dict[str, Any]
    id: uuid.UUID
    """The same for the same finding: told twice after a crash, it counts once."""


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

    @property
    def warnings(self) -> list[str]:
        """A sentence for everything that needs somebody's attention."""
        found = [f"{one['watched']}: {one['why']}" for one in self.unreachable]
        return found + [f"{one['watched']}, {one['place']}: {one['why']}" for one in self.failed]


def look_around(
    sources: Sequence[Watched], terms: Terms, laboratory: Laboratory, state: State, tell: Callable[[Event], None]
) -> Findings:
    """Look at every source once; a source or a checkpoint that fails does not keep the others from being looked at.

    Args:
        sources: of distinct names.
        terms: what counts as settled, as worse and as acceptable.
        laboratory: resolves and scores.
        state: is changed, and saved after every checkpoint.
        tell: is called with every event before it is saved as told.

    Raises:
        CheckpointError: if no source at all could be looked at.
    """
    found = Findings()
    for one in sources:
        try:
            places = look(one.source)
        except CheckpointError as error:
            _note_unreachable(one, str(error), state, found, tell)
            continue
        state.unreachable.pop(one.name, None)
        known = state.places.get(one.name, {})
        state.places[one.name] = {place.name: known[place.name] for place in places if place.name in known}
        visit = _Visit(one, terms, laboratory, state, tell, found)
        for place in places:
            if state.places[one.name].get(place.name) != place.stamp:
                visit.consider(place)
    save(state, laboratory.store)
    if len(found.unreachable) == len(sources):
        raise CheckpointError(f"none of the {len(sources)} watched sources can be looked at. {found.warnings[0]}")
    return found


def _note_unreachable(one: Watched, why: str, state: State, found: Findings, tell: Callable[[Event], None]) -> None:
    log.warning("%s: left out of this look: %s", one.name, why)
    found.unreachable.append({"watched": one.name, "why": why})
    if one.name not in state.unreachable:  # told once, until it is back
        state.unreachable[one.name] = _now()
        event = _event(UNREACHABLE, one.name, {"why": why}, state.watch, state.unreachable[one.name])
        found.events.append(event)
        tell(event)


@dataclass(slots=True)
class _Visit:
    """What is done with the places of one source."""

    watched: Watched
    terms: Terms
    laboratory: Laboratory
    state: State
    tell: Callable[[Event], None]
    found: Findings
    _accepted: dict[str, list[Ref]] = field(default_factory=dict)

    def consider(self, place: Place) -> None:
        """Score what is new and complete."""
        try:
            if why := self._unfinished(place):
                self._leave(place, why)
                return
            ref = self.laboratory.resolve(place.source)
            self._record(place, ref)
        except Exception as error:  # a model can break any library that reads it, and others wait to be scored
            why = str(error) if isinstance(error, MergeError) else f"{type(error).__name__}: {error}"
            if self._has_changed(place):
                self._leave(place, f"it changed while it was read ({why})")
                return
            log.warning("%s, %s: %s", self.watched.name, place.name, why)
            self.found.failed.append({"watched": self.watched.name, "place": place.name, "why": why})
            return
        self.state.places[self.watched.name][place.name] = place.stamp
        save(self.state, self.laboratory.store)

    def _unfinished(self, place: Place) -> str:
        needs_to_settle = place.changed is not None and not self.watched.published
        if needs_to_settle and (age := time.time() - (place.changed or 0.0)) < self.terms.settle_s:
            return f"written to {max(age, 0):.0f} s ago, less than {self.terms.settle_s:g} s"
        return place.lacks()

    def _leave(self, place: Place, why: str) -> None:
        log.info("%s, %s: left for the next time, incomplete: %s", self.watched.name, place.name, why)
        self.found.left.append({"watched": self.watched.name, "place": place.name, "why": why})

    def _has_changed(self, place: Place) -> bool:
        try:
            return not any((one.name, one.stamp) == (place.name, place.stamp) for one in look(self.watched.source))
        except MergeError:
            return False

    def _record(self, place: Place, ref: Ref) -> None:
        history, name = self.state.history, self.watched.name
        if any((one.watched, one.place, one.digest) == (name, place.name, ref.digest) for one in history):
            return
        if self.state.scored(name, ref.digest):
            self._append(self._seen(place, ref, "copy"))
            return
        scores = self.laboratory.scores(ref, f"{name} {place.name}")
        if "://" not in place.source and self._has_changed(place):  # it is read in place
            raise CheckpointError(f"{place.source}: new files came while it was scored.")
        measure = measure_of(scores, self.laboratory.store)
        baseline = self._baseline(measure)
        changed: dict[str, Change] = {}
        verdict: Verdict = "unjudged" if name in self.state.accepted or self.terms.accept == "never" else "first"
        if baseline is not None:
            changed = changes(
                baseline, (ref, scores), self.laboratory.suite, self.terms.tolerance, self.laboratory.store
            )
            verdict = _verdict(changed)
        accepted = verdict == "first" or (
            # Only upwards: a chain of falls that each may be chance must not carry the baseline down.
            self.terms.accept != "never" and verdict in ("unchanged", "improved") and changed["mean"].value >= 0
        )
        seen = self._seen(place, ref, verdict, scores, measure, changed, accepted)
        self._tell_changes(seen, changed)
        self._append(seen)
        if accepted:
            self.state.accept(name, ref.digest, self.laboratory.store)

    def _baseline(self, measure: str) -> tuple[Ref, list[Ref]] | None:
        """The accepted checkpoint with its scores on what is asked now; None if nothing is accepted or it is lost."""
        if (digest := self.state.accepted.get(self.watched.name)) is None:
            return None
        ref = Ref("checkpoint", digest)
        if digest not in self._accepted:
            try:
                self._accepted[digest] = self.laboratory.scores(ref, f"{self.watched.name}, accepted")
            except Exception as error:  # as above
                why = f"the accepted checkpoint cannot be scored on this suite any more ({error}) Approve another one."
                self.found.failed.append({"watched": self.watched.name, "place": ref.digest[:12], "why": why})
                return None
            if self.state.scored(self.watched.name, digest, measure) is None:
                before = self.state.scored(self.watched.name, digest)
                place = Place(before.place if before else "", before.origin if before else "", "")
                self._append(self._seen(place, ref, "rescored", self._accepted[digest], measure))
                self.state.accept(self.watched.name, digest, self.laboratory.store)
        return ref, self._accepted[digest]

    def _seen(
        self,
        place: Place,
        ref: Ref,
        verdict: Verdict,
        scores: Sequence[Ref] = (),
        measure: str = "",
        changed: dict[str, Change] | None = None,
        accepted: bool = False,
    ) -> Seen:
        dimensions, partial = (
            measured(ref, scores, self.laboratory.suite, self.laboratory.store) if scores else ({}, False)
        )
        return Seen(
            time=_now(),
            written="" if place.changed is None else _text(datetime.fromtimestamp(place.changed, UTC)),
            watched=self.watched.name,
            place=place.name,
            origin=place.source,
            digest=ref.digest,
            verdict=verdict,
            accepted=accepted,
            against=self.state.accepted.get(self.watched.name, "") if changed else "",
            measure=measure,
            partial=partial,
            scores={d: {"value": one.value, "stderr": one.stderr, "n": one.n} for d, one in dimensions.items()},
            changes={d: asdict(one) for d, one in (changed or {}).items()},
            refs=[one.digest for one in scores],
        )

    def _append(self, seen: Seen) -> None:
        log.info("%s, %s: %s", seen.watched, seen.place, seen.verdict + (", accepted" if seen.accepted else ""))
        self.state.history.append(seen)
        self.found.recorded.append(seen)

    def _tell_changes(self, seen: Seen, changed: dict[str, Change]) -> None:
        names = {"regressed": REGRESSED, "improved": IMPROVED}
        for dimension in DIMENSIONS:
            if changed and (one := changed[dimension]).outcome in names:
                payload = {
                    "dimension": dimension,
                    **{"difference": one.value, "low": one.low, "high": one.high, "p": one.p, "why": one.why},
                    **{"score": seen.scores[dimension]["value"], "stderr": seen.scores[dimension]["stderr"]},
                    **{"benchmarks": one.benchmarks, "partial": seen.partial},
                    **{"place": seen.place, "origin": seen.origin},
                    **{"digest": seen.digest, "accepted_digest": seen.against},
                }
                key = f"{seen.digest} {seen.against} {seen.measure} {dimension}"
                event = _event(names[one.outcome], seen.watched, payload, self.state.watch, key)
                self.found.events.append(event)
                self.tell(event)


def measure_of(scores: Sequence[Ref], store: Store) -> str:
    """Digest of what was asked and how it was read, whoever was asked."""

    def asked(ref: Ref) -> dict[str, Any]:
        identity = dict(store.manifest(ref).identity)
        identity.pop("model", None)
        if generations := identity.pop("generations", None):
            identity["generations"] = asked(Ref("generations", generations))
        return identity

    return digest_of([asked(ref) for ref in scores])


def _verdict(changed: dict[str, Change]) -> Verdict:
    outcomes = {changed[dimension].outcome for dimension in DIMENSIONS}
    return next((one for one in ("regressed", "improved") if one in outcomes), "unchanged")


def _event(name: str, model: str, payload: dict[str, Any], watch: str, key: str) -> Event:
    told = uuid.uuid5(uuid.NAMESPACE_URL, f"tripoise:{watch}/{model}/{name}/{key}")
    return Event(name, model, {"watch": watch} | payload, told)


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
