"""Is a new checkpoint worse than the accepted one? Paired on the same samples, corrected over the three H."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.comparison import DIMENSIONS, Difference, Row, Score
from tasks.comparison.significance import LEVEL, holm
from tasks.reporting import Entry, compared
from tasks.store import Ref, Store
from tasks.suite import Suite

Outcome = Literal["regressed", "improved", "unchanged"]


@dataclass(frozen=True, slots=True)
class Change:
    """New minus accepted in one H, or in their mean."""

    value: float
    low: float
    high: float
    """A 95% interval, of this difference alone."""
    p: float
    """Two-sided; of an H, Holm-corrected over the three."""
    outcome: Outcome
    """Of the mean always ``unchanged``: the three H decide."""
    why: str = ""
    """``significant``, or ``beyond the tolerance`` for a fall that the samples do not prove."""
    benchmarks: dict[str, float] | None = None
    """Task to new minus accepted, higher is better: where an H changed."""


def measured(model: Ref, scores: Sequence[Ref], suite: Suite, store: Store) -> tuple[dict[str, Score], bool]:
    """Each H and the mean with standard errors, and whether a limit left samples out."""
    row = _rows(suite, [Entry("new", "merged", model, scores)], store)["new"]
    return row.dimensions | {"mean": row.mean}, row.partial


def changes(
    accepted: tuple[Ref, Sequence[Ref]],
    new: tuple[Ref, Sequence[Ref]],
    suite: Suite,
    tolerance: float | None,
    store: Store,
) -> dict[str, Change]:
    """Compare a new checkpoint with the accepted one, H by H.

    An H regressed if it fell and its corrected p-value is below 0.05, or if it fell by more than the tolerance whether
    the samples prove it or not. It improved if it rose and the corrected p-value is below 0.05.

    Args:
        accepted: the accepted checkpoint and its scores, one for each benchmark.
        new: the same of the new checkpoint.
        suite: on which both were scored.
        tolerance: a larger fall counts even if it may be chance, > 0; None: only what the samples prove counts.
        store: where the scores lie.

    Raises:
        RecipeError, IncompatibleError: if they cannot be compared, see :func:`tasks.comparison.compare`.
    """
    entries = [Entry("accepted", "base", *accepted), Entry("new", "merged", *new)]
    found = _rows(suite, entries, store)["new"].against_base
    corrected = holm({place: found[d].p for place, d in enumerate(DIMENSIONS)})
    tasks = {d: [one.task for one in suite.benchmarks if one.dimension == d] for d in DIMENSIONS}
    told = {
        d: _change(found[d], corrected[place], tolerance, {task: found[task].value for task in tasks[d]})
        for place, d in enumerate(DIMENSIONS)
    }
    mean = found["mean"]
    return told | {"mean": Change(mean.value, mean.low, mean.high, mean.p, "unchanged")}


def _rows(suite: Suite, entries: Sequence[Entry], store: Store) -> dict[str, Row]:
    return {row.name: row for row in compared(suite, entries, store).rows}


def _change(found: Difference, p: float, tolerance: float | None, benchmarks: dict[str, float]) -> Change:
    outcome: Outcome = "unchanged"
    why = ""
    if p < LEVEL and found.value != 0:
        outcome, why = ("improved" if found.value > 0 else "regressed"), "significant"
    elif tolerance is not None and found.value < -tolerance:
        outcome, why = "regressed", "beyond the tolerance"
    return Change(found.value, found.low, found.high, p, outcome, why, benchmarks)
