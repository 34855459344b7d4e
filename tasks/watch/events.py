"""Events: what a look tells others, with ids that follow from what is told."""

import uuid
from dataclasses import dataclass
from typing import Any, Final

from merging_core.digest import digest_of

REGRESSED: Final = "tripoise.score.regressed"
IMPROVED: Final = "tripoise.score.improved"
UNREACHABLE: Final = "tripoise.source.unreachable"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that others may act on."""

    name: str
    model: str
    """Name of the source."""
    payload: dict[str, Any]

    @property
    def id(self) -> uuid.UUID:
        """Follows from the content: told twice after a crash, it is recognized as the same."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"tripoise:{digest_of([self.name, self.model, self.payload])}")
