"""Steps over updates: decompose one expert, measure one expert, compare all."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Final

from merging_core.adapter import open_expert
from merging_core.checkpoint import Checkpoint
from merging_core.compatibility import check_compatible, own_tensors
from merging_core.devices import parse_devices
from merging_core.interference import INTERFERENCE_VERSION, Interference, measure_interference
from merging_core.merge import plan_tensors
from merging_core.methods.base import SpectralMethod
from merging_core.recipe import Recipe
from merging_core.statistics import StatisticsSettings
from merging_core.task_vectors import (
    DECOMPOSE_VERSION,
    STATISTICS_VERSION,
    DecomposeSettings,
    decompose,
    measure_expert,
)
from tasks.progress import track_bytes
from tasks.steps import Step
from tasks.store import Ref, Store

_INTERFERENCE_FILE: Final = "interference.json"


def decompose_settings(method: SpectralMethod, num_experts: int) -> DecomposeSettings:
    """What a method needs of each expert's decomposition."""
    return DecomposeSettings(
        rank_fraction=method.stored_fraction(num_experts),
        embeddings=method.embeddings,  # type: ignore[arg-type]
        full_up_to=max(DecomposeSettings().full_up_to, num_experts),
        exact=getattr(method, "exact", False),
    )


def require_compatible(base: Ref, experts: Mapping[str, Ref], store: Store, *, to_be_aligned: bool = False) -> None:
    """Compare all experts with the base before any expensive step; artifacts that do not exist yet are passed over.

    Args:
        base: checkpoint of the base.
        experts: expert name to checkpoint.
        store: where they lie.
        to_be_aligned: whether vocabularies may differ, since :func:`tasks.align.align` comes next.

    Raises:
        IncompatibleError: listing every mismatch of every expert.
    """
    present = {name: ref for name, ref in experts.items() if store.has(ref)}
    if not store.has(base):
        return
    with ExitStack() as stack:
        reference = stack.enter_context(Checkpoint(store.folder(base), "the base"))
        opened = {
            name: stack.enter_context(open_expert(store.folder(ref), reference, f"expert {name!r}"))
            for name, ref in present.items()
        }
        check_compatible(reference, opened, to_be_aligned=to_be_aligned)


def require_rules(recipe: Recipe, base: Ref, store: Store) -> None:
    """Compare a recipe's rules with the tensors of the base before any expensive step, if the base is there.

    Raises:
        RecipeError: see :func:`merging_core.rules.treatments`.
    """
    if store.has(base):
        with Checkpoint(store.folder(base), "the base") as reference:
            plan_tensors(recipe, own_tensors(reference))


def decompose_step(
    base: Ref, expert: Ref, name: str, settings: DecomposeSettings, store: Store, device: str = "cpu"
) -> Step:
    """Decompose the updates of one expert on a device; depends on nothing but base, expert and what is kept."""

    def make(out: Path) -> None:
        with (
            Checkpoint(store.folder(base), "the base") as reference,
            open_expert(store.folder(expert), reference, f"expert {name!r}") as tuned,
            track_bytes(f"decompose {name}", sum(info.num_bytes for info in tuned.tensors.values())) as count,
        ):
            decompose(reference, tuned, settings, out, count, resume=True, devices=parse_devices(device))

    identity = {
        "version": DECOMPOSE_VERSION,
        "base": base.digest,
        "expert": expert.digest,
        "settings": asdict(settings),
    }
    return Step("task-vectors", f"decompose {name}", identity, (base, expert), make, device=device)


def measure_step(base: Ref, expert: Ref, name: str, settings: StatisticsSettings, store: Store) -> Step:
    """Measure outliers and sparsity of one expert's updates."""

    def make(out: Path) -> None:
        with (
            Checkpoint(store.folder(base), "the base") as reference,
            open_expert(store.folder(expert), reference, f"expert {name!r}") as tuned,
        ):
            measure_expert(reference, tuned, settings, out)

    identity = {
        "version": STATISTICS_VERSION,
        "base": base.digest,
        "expert": expert.digest,
        "settings": asdict(settings),
    }
    return Step("statistics", f"measure {name}", identity, (base, expert), make, device="cpu")


def interference_step(base: Ref, experts: Mapping[str, Ref], store: Store) -> Step:
    """Compare the updates of all experts with each other."""

    def make(out: Path) -> None:
        found = measure_interference(store.folder(base), {name: store.folder(ref) for name, ref in experts.items()})
        (out / _INTERFERENCE_FILE).write_text(json.dumps(asdict(found)))

    identity = {
        "version": INTERFERENCE_VERSION,
        "base": base.digest,
        "experts": {name: ref.digest for name, ref in experts.items()},
    }
    return Step("interference", "compare experts", identity, (base, *experts.values()), make)


def read_interference(ref: Ref, store: Store) -> Interference:
    """Read what :func:`interference_step` wrote."""
    stored = json.loads((store.folder(ref) / _INTERFERENCE_FILE).read_text())
    return Interference(
        pairs=tuple((one, other) for one, other in stored["pairs"]),
        tensors=tuple(stored["tensors"]),
        cosines=tuple(tuple(row) for row in stored["cosines"]),
        overall=tuple(stored["overall"]),
    )
