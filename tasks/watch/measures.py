"""What scores were made by: which of them can be compared, and what else than the model may have changed them."""

from collections.abc import Sequence
from typing import Any, Final

from merging_core.digest import digest_of
from tasks.store import Ref, Store
from tasks.suite import Suite

_LIBRARIES: Final = ("torch", "transformers")
"""Their versions are no part of the identity of scores, and may change them all the same."""


def measure_of(scores: Sequence[Ref], suite: Suite, store: Store) -> str:
    """Digest of what was asked, how it was read and what it counts, whoever was asked."""

    def asked(ref: Ref) -> dict[str, Any]:
        identity = dict(store.manifest(ref).identity)
        identity.pop("model", None)
        if generations := identity.pop("generations", None):
            identity["generations"] = asked(Ref("generations", generations))
        return identity

    counted = [[one.task, one.dimension, one.weight, one.higher_is_better] for one in suite.benchmarks]
    return digest_of([counted, [asked(ref) for ref in scores]])


def other_libraries(accepted: Sequence[Ref], new: Sequence[Ref], store: Store) -> str:
    """Say if other versions of what runs models made the two."""
    both = zip(_LIBRARIES, _libraries(accepted, store), _libraries(new, store), strict=True)
    told = [f"{name} {before}, this one with {after}" for name, before, after in both if before != after]
    if not told:
        return ""
    return f"the accepted one was scored with {'; '.join(told)}: part of a difference may come from that."


def _libraries(scores: Sequence[Ref], store: Store) -> list[str]:
    """Of each library the version, or versions, with which a model answered."""
    made = []
    for ref in scores:
        manifest = store.manifest(ref)
        generations = manifest.identity.get("generations")
        made.append(store.manifest(Ref("generations", generations)) if generations else manifest)
    return [", ".join(sorted({one.versions.get(name, "none") for one in made})) for name in _LIBRARIES]
