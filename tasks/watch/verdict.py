"""Is a new checkpoint worse than the accepted one? Paired on the same samples, corrected over the three H."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.comparison import DIMENSIONS, Comparison, Row, Score
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
    n: int
    """Samples that were compared."""
    left_out: int
    """Samples that were not, as a judge's reply to one of the two could not be read."""
    outcome: Outcome
    """Of the mean always ``unchanged``: the three H decide."""
    why: str = ""
    """``significant``, or ``beyond the tolerance`` for a fall that the samples do not prove."""
    benchmarks: dict[str, float] | None = None
    """Task to new minus accepted, higher is better: where an H changed."""


def measured(model: Ref, scores: Sequence[Ref], suite: Suite, store: Store) -> tuple[dict[str, Score], bool]:
    """Each H and the mean with standard errors, and whether a limit left samples out."""
    row = _new(compared(suite, [Entry("new", "merged", model, scores)], store))
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
    comparison = compared(suite, entries, store)
    row = _new(comparison)
    corrected = holm({place: row.against_base[d].p for place, d in enumerate(DIMENSIONS)})
    told = {}
    for place, d in enumerate(DIMENSIONS):
        found, tasks = row.against_base[d], [one.task for one in suite.benchmarks if one.dimension == d]
        outcome, why = _outcome(found.value, corrected[place], tolerance)
        told[d] = Change(
            value=found.value,
            low=found.low,
            high=found.high,
            p=corrected[place],
            n=row.dimensions[d].n,
            left_out=sum(comparison.left_out.get(task, 0) for task in tasks),
            outcome=outcome,
            why=why,
            benchmarks={task: row.against_base[task].value for task in tasks},
        )
    mean, left_out = row.against_base["mean"], sum(comparison.left_out.values())
    return told | {"mean": Change(mean.value, mean.low, mean.high, mean.p, row.mean.n, left_out, "unchanged")}


def _new(comparison: Comparison) -> Row:
    return next(row for row in comparison.rows if row.name == "new")


def _outcome(value: float, p: float, tolerance: float | None) -> tuple[Outcome, str]:
    if p < LEVEL and value != 0:
        return ("improved" if value > 0 else "regressed"), "significant"
    if tolerance is not None and value < -tolerance:
        return "regressed", "beyond the tolerance"
    return "unchanged", ""
