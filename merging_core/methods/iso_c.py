"""Iso-C: the summed update with an even spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from merging_core.methods.base import Site, add_update
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.updates import is_matrix, mean_update, noise_floor, real_directions, weighted_update


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoC:
    """Isotropic merging in the common subspace.

    For each matrix, with ``sum_i w_i (W_i - W_0) = U diag(s) V^T``: ``W = W_0 + scale * mean(s) U V^T``. Other tensors:
    the mean of the weighted updates, times scale. A recipe's weight is a factor on its expert's update.

    Numerics:
        Decomposed in float64. Directions at the rounding floor of the narrowest dtype that holds the experts, and
        below 1e-6 of the largest, are not directions; an even spectrum would lift them to full size.

    References:
        Marczak et al., No Task Left Behind (arXiv 2502.04959), Iso-C.
        Deviation: for a rank-deficient sum U, V and the mean cover the directions that exist; the sum of the singular
        values is kept in both forms. FusionBench 0.2.33 spreads it over arbitrary null directions too.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["iso_c"] = "iso_c"
    """Sum of the updates with all singular values equal."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the merged update, >= 0."""

    def __post_init__(self) -> None:
        check_bounds(self, "iso_c")
        check_choices(self, "iso_c")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        if not is_matrix(base):
            return add_update(base, mean_update(base, experts, weights).mul_(self.scale))
        total = weighted_update(base, experts[0], weights[0], site.tensor, site.experts[0])
        for at in range(1, len(experts)):
            total += weighted_update(base, experts[at], weights[at], site.tensor, site.experts[at])
        found = real_directions(total, min(base.shape), noise_floor(experts, weights))
        if not found.rank:
            return base.clone()
        even = (found.left * (self.scale * found.spectrum.mean())) @ found.right_t
        return add_update(base, even.to(base.dtype))
