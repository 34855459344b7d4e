"""Names that people write: a wrong one is refused, with the nearest right one, and so is one that stands twice."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from merging_core.errors import RecipeError

Name = TypeVar("Name", str, int)


def check_names(subject: str, data: Mapping[Any, Any], allowed: Iterable[str]) -> None:
    """Raise a RecipeError for an entry that ``subject`` does not have, with the nearest right name."""
    allowed = list(allowed)
    for name in data:
        if name not in allowed:
            raise RecipeError(
                f"{subject}: has no entry {name!r}.{nearest(str(name), allowed)} All: {', '.join(allowed)}."
            )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence that proposes the nearest right name, or nothing."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(allowed), n=1, cutoff=0.5)
    return f" Nearest: {close[0]!r}." if close else ""


def repeated(names: Iterable[Name]) -> list[Name]:
    """Those that stand there more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
