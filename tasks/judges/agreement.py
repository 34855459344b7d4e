"""Agreement of two judges over the same generations: Cohen's kappa with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merging_core.errors import CheckpointError, RecipeError
from tasks.scores import SAMPLES_FILE, read_record
from tasks.store import Ref, Store
from tasks.tables import read_rows


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two judges agree on one benchmark. Samples that either could not decide are counted, and left out."""

    task: str
    both_yes: int
    only_first: int
    """The first judge says yes, the second no."""
    only_second: int
    both_no: int
    unparsed_first: int
    unparsed_second: int
    kappa: float | None
    """Cohen's kappa, 1 at best, 0 as by chance; None where it is not defined."""
    stderr: float | None
    """Its standard error for large samples; None where it is not defined."""

    @property
    def n(self) -> int:
        """Samples that both decided."""
        return self.both_yes + self.only_first + self.only_second + self.both_no

    @property
    def share(self) -> float | None:
        """Share of those on which they agree; None of none."""
        return (self.both_yes + self.both_no) / self.n if self.n else None

    def record(self) -> dict[str, Any]:
        """JSON-able, for reports."""
        return {**asdict(self), "n": self.n, "share": self.share}


def agreement(first: Ref, second: Ref, store: Store) -> Agreement:
    """Compare two scores of judges on one benchmark.

    Args:
        first: scores by one judge.
        second: scores by another, of the same generations.
        store: where both lie.

    Raises:
        CheckpointError: if they are not of the same samples and responses.
        RecipeError: if a sample has several responses: then a value is a share, not a verdict.
    """
    ours, theirs = _values(first, store), _values(second, store)
    if {key: said for key, (said, _) in ours.items()} != {key: said for key, (said, _) in theirs.items()}:
        raise CheckpointError(f"{first} and {second}: judge different samples. Compare judges of the same generations.")
    counts = {(a, b): 0 for a in (1.0, 0.0, None) for b in (1.0, 0.0, None)}
    for key, (_, value) in ours.items():
        pair = (value, theirs[key][1])
        if pair not in counts:
            raise RecipeError(
                f"{first} and {second}: agreement needs one response for each prompt, and {key} has several: "
                f"values {pair}. Leave out the second judge of this benchmark."
            )
        counts[pair] += 1
    table = [[counts[1.0, 1.0], counts[1.0, 0.0]], [counts[0.0, 1.0], counts[0.0, 0.0]]]
    kappa, stderr = cohen_kappa(table)
    return Agreement(
        task=read_record(first, store)["task"],
        both_yes=table[0][0],
        only_first=table[0][1],
        only_second=table[1][0],
        both_no=table[1][1],
        unparsed_first=sum(count for (value, _), count in counts.items() if value is None),
        unparsed_second=sum(count for (_, value), count in counts.items() if value is None),
        kappa=kappa,
        stderr=stderr,
    )


def cohen_kappa(table: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
    """Cohen's kappa and its standard error from a square table of counts.

    With shares ``p_ij`` of the table, row sums ``r_i`` and column sums ``c_j``::

        observed = sum_i p_ii,   expected = sum_i r_i c_i,   kappa = (observed - expected) / (1 - expected)
        variance = (A + B - C) / (n (1 - expected)^2)
        A = sum_i p_ii (1 - (r_i + c_i) (1 - kappa))^2,   B = (1 - kappa)^2 sum_{i != j} p_ij (c_i + r_j)^2
        C = (kappa - expected (1 - kappa))^2

    Args:
        table: ``table[i][j]`` items that the first judge put into category i and the second into j.

    Returns:
        Kappa in [-1, 1] and its standard error >= 0; None, None of no items, or if both judges use one and the same
        category throughout.

    References:
        J. Cohen, 1960, Educational and Psychological Measurement 20, 37-46; J. L. Fleiss, J. Cohen, B. S. Everitt,
        1969, Psychological Bulletin 72, 323-327 (the standard error for kappa other than 0). Deviation: none.
    """
    n, size = sum(map(sum, table)), range(len(table))
    if n == 0:
        return None, None
    share = [[count / n for count in row] for row in table]
    rows, columns = [sum(row) for row in share], [sum(column) for column in zip(*share, strict=True)]
    observed, expected = sum(share[i][i] for i in size), sum(rows[i] * columns[i] for i in size)
    # In counts, since a rounded 1 must not divide.
    if any(sum(table[i]) == sum(row[i] for row in table) == n for i in size):
        return None, None
    kappa = (observed - expected) / (1 - expected)
    a = sum(share[i][i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in size)
    b = sum(share[i][j] * (columns[i] + rows[j]) ** 2 for i in size for j in size if i != j)
    c = (kappa - expected * (1 - kappa)) ** 2
    # Rounding can make a variance of 0 a little negative.
    variance = max(a + (1 - kappa) ** 2 * b - c, 0.0) / (n * (1 - expected) ** 2)
    return kappa, math.sqrt(variance)


def _values(ref: Ref, store: Store) -> dict[str, tuple[str, float | None]]:
    """Sample id to response and value."""
    rows = read_rows(store.folder(ref) / SAMPLES_FILE, ["id", "response", "value"])
    return {row["id"]: (row["response"], row["value"]) for row in rows}
