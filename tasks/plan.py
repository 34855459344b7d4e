"""Planning: which steps of a flow would be computed, and why, without computing any."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from merging_core.errors import CheckpointError
from tasks.progress import silent
from tasks.sources import resolve
from tasks.sources.mini3h import mini3h_step, parse_mini3h
from tasks.sources.names import is_data_recipe
from tasks.steps import Step
from tasks.store import Ref, Store


@dataclass(frozen=True, slots=True)
class Planned:
    """One step as the store sees it now."""

    title: str
    ref: Ref
    reused: bool
    why: str
    """For a step that would be computed: how the nearest stored artifact differs."""


class Planner:
    """Ask the store for every step instead of running it.

    Local folders are hashed, hub repositories asked for their commit and fetched: what would be computed follows from
    content. Nothing is trained, decomposed, merged or evaluated.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.unknown: list[str] = []
        """What a flow will also compute, and cannot be known before."""
        self._planned: dict[Ref, Planned] = {}
        self._stored: dict[str, list[dict[str, Any]]] = {}
        """Kind to the flat identities of what the store has of it: read once, since many steps may be missing."""

    @property
    def planned(self) -> list[Planned]:
        """Every step that was asked for, once, in order."""
        return list(self._planned.values())

    def resolve(self, sources: Sequence[str]) -> list[Ref]:
        """See :class:`tasks.steps.Runner`."""
        return [self._resolve(source) for source in sources]

    def build(self, name: str, title: str, steps: Sequence[Step]) -> list[Ref]:
        """See :class:`tasks.steps.Runner`."""
        return [self._ask(step) for step in steps]

    def map(self, name: str, groups: Sequence[tuple[str, Sequence[Step]]]) -> list[list[Ref]]:
        """See :class:`tasks.steps.Runner`."""
        return [self.build(name, title, steps) for title, steps in groups]

    def _resolve(self, source: str) -> Ref:
        if is_data_recipe(source):
            from tasks.data.source import load_data_recipe
            from tasks.training.mixture import trained_model

            return trained_model(load_data_recipe(source), self)
        if not source.startswith("mini3h://"):
            return resolve(source, self.store).ref
        role, seed, budget = parse_mini3h(source)
        base = None
        if role != "base":
            base = self._resolve(source.replace(f"mini3h://{role}", "mini3h://base"))
        return self._ask(mini3h_step(role, seed, budget, base, self.store, silent))

    def _ask(self, step: Step) -> Ref:
        ref = step.ref
        if ref not in self._planned:
            found = self.store.find(step.kind, step.identity) is not None
            self._planned[ref] = Planned(step.title, ref, found, "" if found else self._why(step))
        return ref

    def _why(self, step: Step) -> str:
        wanted, others = _flat(step.identity), self._identities(step.kind)
        related = [other for other in others if other.keys() & wanted.keys()]
        if not related:
            return f"no {step.kind} in the store"
        nearest = min((_differences(other, wanted) for other in related), key=len)
        if len(nearest) > _MOST_DIFFERENCES:
            return "nothing similar in the store"
        return "; ".join(nearest)

    def _identities(self, kind: str) -> list[dict[str, Any]]:
        if kind not in self._stored:
            self._stored[kind] = []
            for ref in self.store.refs(kind):
                with suppress(CheckpointError):  # a damaged record is the business of `tripoise store verify`
                    self._stored[kind].append(_flat(self.store.manifest(ref).identity))
        return self._stored[kind]


_MOST_DIFFERENCES = 4


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = sorted(stored.keys() | wanted.keys())
    return [
        f"{name} {_short(stored.get(name))} -> {_short(wanted.get(name))}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: leaf for key in value for name, leaf in _flat(value[key], f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple):
        return {name: leaf for i, item in enumerate(value) for name, leaf in _flat(item, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): value}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
