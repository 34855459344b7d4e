"""Linear merge: a weighted mean of the experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from merging_core.election import sum_of_weights
from merging_core.methods.base import Site
from merging_core.settings import STRICT, check_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Average the experts: ``W = sum_i w_i W_i / sum_i w_i``.

    The base takes part only as the reference for names and shapes. With weights on the simplex over experts trained for
    different rewards this is a rewarded soup.

    Numerics:
        Weights are normalised in float64 before they meet a tensor: one expert is returned bit for bit.

    References:
        Wortsman et al., Model soups (arXiv 2203.05482); Rame et al., Rewarded soups (arXiv 2306.04488).
        Deviation: none.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["linear"] = "linear"
    """Weighted mean of the experts (model soup, rewarded soup)."""
    normalize: bool = True
    """Divide by the sum of the weights."""

    def __post_init__(self) -> None:
        check_choices(self, "linear")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        total = self.divisor(weights)
        # The first term starts the sum: 0.0 + (-0.0) would lose the sign of a zero.
        merged = experts[0] * (weights[0] / total)
        for expert, weight in zip(experts[1:], weights[1:], strict=True):
            merged.add_(expert, alpha=weight / total)
        return merged

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that cancel; see :meth:`divisor`."""
        self.divisor(weights)

    def divisor(self, weights: Sequence[float]) -> float:
        """What the weighted sum is divided by: the sum of the weights, or 1.

        Raises:
            RecipeError: if they cancel, up to rounding.
        """
        return sum_of_weights(weights, "linear") if self.normalize else 1.0
