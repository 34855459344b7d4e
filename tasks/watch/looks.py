"""One look at all watched sources: what is new by content is scored, compared with what is accepted, and recorded."""

import logging
from collections.abc import Callable, Sequence
from typing import Final

from merging_core.errors import CheckpointError
from tasks.store import Store
from tasks.watch.events import UNREACHABLE, Event
from tasks.watch.places import check_form, look
from tasks.watch.records import Findings, Laboratory, Terms, Watched
from tasks.watch.state import State, now, save
from tasks.watch.visits import Visit

Tell = Callable[[Event], None]
_SHOWN: Final = 3

log = logging.getLogger("tripoise.watch")


def look_around(
    sources: Sequence[Watched], terms: Terms, laboratory: Laboratory, state: State, tell: Tell | None
) -> Findings:
    """Look at every source once; a source or a checkpoint that fails does not keep the others from being looked at.

    Args:
        sources: of distinct names.
        terms: what counts as settled, as worse and as acceptable.
        laboratory: resolves and scores.
        state: is changed, and saved after every checkpoint.
        tell: is called with every event, in order, after what it tells was saved, and returns once it is told; one that
            it fails to tell is kept for the next look. None: there is nobody to tell, all are kept.

    Raises:
        RecipeError: if a source is of no form that can be watched; none was looked at then.
        CheckpointError: if no source at all could be looked at.
    """
    for one in sources:
        check_form(one.source)
    found = Findings()
    _tell_all(state, laboratory.store, found, tell)
    for one in sources:
        known = state.places.get(one.name, {})
        try:
            places = look(one.source)
            if known and not places:
                raise CheckpointError(_emptied(one.source, sorted(known)))
        except CheckpointError as error:
            _note_unreachable(one, str(error), state, found)
            _tell_all(state, laboratory.store, found, tell)
            continue
        state.unreachable.pop(one.name, None)
        state.places[one.name] = {place.name: known[place.name] for place in places if place.name in known}
        visit = Visit(one, terms, laboratory, state, found)
        for place in places:
            if state.places[one.name].get(place.name) != place.stamp:
                visit.consider(place)
                _tell_all(state, laboratory.store, found, tell)
    save(state, laboratory.store)
    if len(found.unreachable) == len(sources):
        raise CheckpointError(f"none of the {len(sources)} watched sources can be looked at. {found.warnings[0]}")
    return found


def _emptied(source: str, known: Sequence[str]) -> str:
    names = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
    return (
        f"{source}: holds no checkpoints any more, before it held {names}. Check that its disk is mounted; if they "
        "were removed, this ends with the next one that is written."
    )


def _note_unreachable(one: Watched, why: str, state: State, found: Findings) -> None:
    log.warning("%s: left out of this look: %s", one.name, why)
    found.unreachable.append({"watched": one.name, "why": why})
    if one.name not in state.unreachable:  # told once, until it is back
        state.unreachable[one.name] = now()
        event = Event(UNREACHABLE, one.name, {"watch": state.watch, "why": why, "since": state.unreachable[one.name]})
        found.events.append(event)
        state.untold.append(event)


def _tell_all(state: State, store: Store, found: Findings, tell: Tell | None) -> None:
    """Tell what was found, each event after it was saved and before it counts as told."""
    if tell is None or not state.untold:
        return
    save(state, store)
    found.untold = ""
    while state.untold:
        try:
            tell(state.untold[0])
        except Exception as error:  # whatever carries events; the look goes on
            found.untold = (
                f"{len(state.untold)} events could not be told ({type(error).__name__}: {error}). Check the server; "
                "the next run tells them."
            )
            log.warning("%s", found.untold)
            return
        state.untold.pop(0)
        save(state, store)
