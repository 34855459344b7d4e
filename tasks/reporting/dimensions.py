"""Scores of each H from scores on benchmarks, and the one rule by which a setting is chosen on validation."""

from collections.abc import Sequence
from statistics import fmean
from typing import get_args

from merging_core.errors import NumericalError
from tasks.scores import read_record
from tasks.store import Ref, Store
from tasks.suite import Dimension, Suite


def dimension_scores(scores: Sequence[Ref], suite: Suite, store: Store) -> dict[str, float]:
    """Score of each H, and their ``mean``, from scores on a suite; see :mod:`tasks.comparison`.

    Of several scores of one benchmark, as several seeds give, the mean counts.

    Raises:
        NumericalError: if a benchmark has no value: no reply of its judge could be read.
    """
    measured: dict[str, list[float]] = {}
    for ref in scores:
        record = read_record(ref, store)
        if record["value"] is None:
            raise NumericalError(
                f"{ref}: none of the {record['unparsed']} verdicts on benchmark {record['task']} could be read. "
                "Look at the judge's replies in its samples, or take another judge."
            )
        measured.setdefault(record["task"], []).append(record["value"])
    records = {task: fmean(values) for task, values in measured.items()}
    found = {}
    for dimension in get_args(Dimension):
        members = [one for one in suite.benchmarks if one.dimension == dimension]
        values = [records[one.task] for one in members]
        turned = [value if one.higher_is_better else 1 - value for one, value in zip(members, values, strict=True)]
        found[dimension] = fmean(turned, weights=[one.weight for one in members])
    return found | {"mean": fmean(found.values())}


def best_on_validation(validation: Sequence[Sequence[Ref]], suite: Suite, store: Store) -> int:
    """Index of the candidate with the highest mean of the three H on validation, over all seeds; of equals, the first.

    The planner asks before there are scores: then it is the first.
    """
    if not all(store.home(ref).exists() for scores in validation for ref in scores):
        return 0
    means = [dimension_scores(scores, suite, store)["mean"] for scores in validation]
    return means.index(max(means))
