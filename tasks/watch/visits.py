"""What is done with the places of one source: what is new and complete is scored, compared and recorded."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from merging_core.errors import CheckpointError, MergeError
from tasks.comparison import DIMENSIONS
from tasks.store import Ref
from tasks.watch.events import IMPROVED, REGRESSED, Event
from tasks.watch.measures import measure_of, other_libraries
from tasks.watch.places import Place, look
from tasks.watch.records import Findings, Laboratory, Terms, Watched
from tasks.watch.state import Seen, State, Verdict, now, save, text
from tasks.watch.verdict import Change, changes, measured

_EVENTS: Final = {"regressed": REGRESSED, "improved": IMPROVED}

log = logging.getLogger("tripoise.watch")


@dataclass(slots=True)
class Visit:
    """What is done with the places of one source."""

    watched: Watched
    terms: Terms
    laboratory: Laboratory
    state: State
    found: Findings
    _accepted: dict[str, list[Ref] | None] = field(default_factory=dict)
    """Digest of an accepted checkpoint to its scores on what is asked now; None: it cannot be scored any more."""

    def consider(self, place: Place) -> None:
        """Score what is new and complete; what was recorded is saved, with the events that tell of it."""
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
        name = self.watched.name
        if (newest := self.state.newest(name, place.name)) and newest.digest == ref.digest:
            return
        if self.state.scored(name, ref.digest):
            self._append(self._seen(place, ref, "copy"))
            return
        scores = self.laboratory.scores(ref, f"{name} {place.name}")
        if "://" not in place.source and self._has_changed(place):  # it is read in place
            raise CheckpointError(f"{place.source}: new files came while it was scored.")
        measure = measure_of(scores, self.laboratory.suite, self.laboratory.store)
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
        if baseline is not None:
            seen = replace(seen, caution=other_libraries(baseline[1], scores, self.laboratory.store))
        self._append(seen)
        events = _events(self.state.watch, seen, changed)
        self.found.events += events
        self.state.untold += events
        if accepted:
            self.state.accepted[name] = ref.digest

    def _baseline(self, measure: str) -> tuple[Ref, list[Ref]] | None:
        """The accepted checkpoint with its scores on what is asked now; None if nothing is accepted or it is lost."""
        if (digest := self.state.accepted.get(self.watched.name)) is None:
            return None
        ref = Ref("checkpoint", digest)
        if digest not in self._accepted:
            try:
                scores = self.laboratory.scores(ref, f"{self.watched.name}, accepted")
            except Exception as error:  # as above
                why = f"the accepted checkpoint cannot be scored on this suite any more ({error}) Approve another one."
                self.found.failed.append({"watched": self.watched.name, "place": ref.digest[:12], "why": why})
                self._accepted[digest] = None
                return None
            self._accepted[digest] = scores
            if self.state.scored(self.watched.name, digest, measure) is None:
                before = self.state.scored(self.watched.name, digest)
                place = Place(before.place if before else "", before.origin if before else "", "")
                self._append(self._seen(place, ref, "rescored", scores, measure))
        found = self._accepted[digest]
        return None if found is None else (ref, found)

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
            time=now(),
            written="" if place.changed is None else text(datetime.fromtimestamp(place.changed, UTC)),
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


def _verdict(changed: dict[str, Change]) -> Verdict:
    outcomes = {changed[dimension].outcome for dimension in DIMENSIONS}
    return next((one for one in ("regressed", "improved") if one in outcomes), "unchanged")


def _events(watch: str, seen: Seen, changed: dict[str, Change]) -> list[Event]:
    """One for every H that regressed or improved."""
    told = []
    for dimension in DIMENSIONS:
        if changed and (one := changed[dimension]).outcome in _EVENTS:
            payload = {
                **{"watch": watch, "dimension": dimension},
                **{"difference": one.value, "low": one.low, "high": one.high, "p": one.p, "why": one.why},
                **{"n": one.n, "left_out": one.left_out},
                **{"score": seen.scores[dimension]["value"], "stderr": seen.scores[dimension]["stderr"]},
                **{"benchmarks": one.benchmarks, "partial": seen.partial},
                **{"place": seen.place, "origin": seen.origin},
                **{"digest": seen.digest, "accepted_digest": seen.against},
            }
            told.append(Event(_EVENTS[one.outcome], seen.watched, payload))
    return told
