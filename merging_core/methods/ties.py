"""TIES: trim each update, elect a sign for every entry, average the updates that agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from merging_core.election import elected_sum
from merging_core.methods.base import Site
from merging_core.methods.blockwise import merge_sparse
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.sparsity import keep_largest, sparsify


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """Trim, elect sign, merge.

    Keep of each ``D_i = W_i - W_0`` the ``max(1, int(density * size))`` entries of largest magnitude, as ``E_i``. With
    ``s = +1 if sum_i w_i E_i >= 0 else -1`` and ``A_i = [sign(w_i E_i) = s]``, entry by entry,
    ``W = W_0 + scale * sum_i A_i w_i E_i / sum_i A_i w_i``.

    Numerics:
        The threshold of the trim is exact and found by counting; ballots are summed in float64.

    References:
        Yadav et al., TIES-Merging: Resolving interference when merging models (arXiv 2306.01708).
        Deviations from the paper: updates are trimmed tensor by tensor, not over the whole model (no global scope yet);
        weights multiply the updates and vote, and the mean is weighted; exact cancellation elects +.
        Deviations from mergekit: the default density is the paper's 0.2 (its 1.0 does not trim); entries equal in
        magnitude at the cut are all kept, not an arbitrary choice of them.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["ties"] = "ties"
    """Trim small entries, elect signs, average what agrees."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the merged update, >= 0."""
    density: Annotated[float, Ge(0), Le(1)] = 0.2
    """Fraction of entries kept of each update, by magnitude, in [0, 1]."""
    rescale: Literal["l1", "none"] = "none"
    """What is kept is scaled to the update's L1 norm, or left."""
    weight_in_election: bool = True
    """Whether the weights count when signs are elected."""
    normalize: bool = True
    """Divide each entry by the sum of the weights of the experts that agree with its sign."""

    def __post_init__(self) -> None:
        check_bounds(self, "ties")
        check_choices(self, "ties")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        updates = [
            sparsify(base, expert, keep_largest(base, expert, self.density), partial(site.generator, own), self.rescale)
            for own, expert in zip(site.experts, experts, strict=True)
        ]
        combine = partial(
            elected_sum, weights=weights, weight_in_election=self.weight_in_election, normalize=self.normalize
        )
        return merge_sparse(base, updates, combine, self.scale)
