"""DARE: drop entries at random and rescale the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from merging_core.election import sum_of_weights, weighted_sum
from merging_core.methods.base import Site
from merging_core.methods.blockwise import merge_sparse
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.sparsity import KeepAtRandom, sparsify


@dataclass(frozen=True, kw_only=True, slots=True)
class Dare:
    """Drop and rescale, then add.

    ``M_i ~ Bernoulli(density)`` for every entry; ``W = W_0 + scale * sum_i w_i M_i (W_i - W_0) / density``.

    Numerics:
        Masks come from seed, tensor name and expert name alone; the masks of a lower density lie within those of a
        higher one. L1 norms in float64.

    References:
        Yu et al., Language models are Super Mario (arXiv 2311.03099).
        Deviation from the paper: none; ``scale``, ``weight`` and ``normalize`` are additions.
        Deviations from mergekit's dare_linear: what is kept is divided by the density, so that the merge is right on
        average (its way is ``rescale: l1``, which differs with every tensor); the default density is 0.5 (its 1.0 drops
        nothing); the L1 norm is matched however small it is; weights that cancel cannot be normalised, instead of not
        being divided; masks do not depend on other tensors.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["dare"] = "dare"
    """Drop entries of each update at random, rescale the rest, sum."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the merged update, >= 0."""
    density: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of each entry to be kept, in [0, 1]."""
    rescale: Literal["inverse_density", "l1", "none"] = "inverse_density"
    """What is kept is divided by its probability, or scaled to the update's L1 norm, or left."""
    normalize: bool = False
    """Divide by the sum of the weights."""

    def __post_init__(self) -> None:
        check_bounds(self, "dare")
        check_choices(self, "dare")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        drop = KeepAtRandom(self.density, divide=self.rescale == "inverse_density")
        updates = [
            sparsify(base, expert, drop, partial(site.generator, own), self.rescale)
            for own, expert in zip(site.experts, experts, strict=True)
        ]
        divisor = self.divisor(weights)
        return merge_sparse(base, updates, partial(weighted_sum, weights=weights, divisor=divisor), self.scale)

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that cancel, if they are to be normalised."""
        self.divisor(weights)

    def divisor(self, weights: Sequence[float]) -> float:
        """What the weighted sum is divided by: the sum of the weights, or 1.

        Raises:
            RecipeError: if they cancel, up to rounding.
        """
        return sum_of_weights(weights, "dare") if self.normalize else 1.0
