"""What stands in a report: models with their scores, and second opinions of other judges."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.comparison import Role
from tasks.judges.agreement import agreement
from tasks.scores import read_record
from tasks.store import Ref, Store


@dataclass(frozen=True, slots=True)
class Entry:
    """One model in a report."""

    name: str
    role: Role
    model: Ref
    scores: Sequence[Ref]
    """On the test split, one for each benchmark."""
    validation: Sequence[Ref] = ()
    """On the validation split, where a choice was made by them."""
    recipe: str = ""
    """Text of the recipe, for merges."""
    seed: int = 0
    """Of world and training. Entries of one name are one line of the report."""


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """Scores of one model on one benchmark by two judges."""

    model: str
    """How the report calls the model."""
    first: Ref
    """The scores that count."""
    second: Ref
    """Those of the second judge, of the same responses."""

    def record(self, store: Store) -> dict[str, Any]:
        """How far the two agree, JSON-able; see :func:`tasks.judges.agreement.agreement`."""
        judges = ", ".join(read_record(ref, store)["judge"]["name"] for ref in (self.first, self.second))
        return {"model": self.model, "judges": judges, **agreement(self.first, self.second, store).record()}
