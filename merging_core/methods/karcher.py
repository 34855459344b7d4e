"""Karcher: the Riemannian barycentre of the experts' directions, at their mean norm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor

from merging_core.errors import RecipeError
from merging_core.methods.base import Site
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.sphere import barycentre_coefficients, combined, inner_products


@dataclass(frozen=True, kw_only=True, slots=True)
class Karcher:
    """Average on the sphere: ``W = (sum_i a_i |W_i|) u``, ``u = argmin sum_i a_i angle(u, W_i / |W_i|)^2``.

    ``a_i = w_i / sum_j w_j``, each tensor a flat vector. ``u`` is found by ``u <- exp_u(sum_i a_i log_u(u_i))`` from
    the normalised mean. The base is not a point: it is only the reference for names and shapes. Two experts give the
    point at ``a_2`` of the great circle between their directions.

    A recipe's weight is the expert's mass, >= 0.

    Numerics:
        The iteration runs in float64 on one coefficient an expert, from inner products taken once; the tensors are
        read twice whatever the number of iterations. An all-zero tensor counts for the norm, not for the direction.

    References:
        Karcher, Riemannian center of mass and mollifier smoothing (Comm. Pure Appl. Math. 30, 1977).
        Deviations: mergekit 0.1.5 knows equal weights only, and counts a base that it is given as one more point.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["karcher"] = "karcher"
    """Mean of the experts on the sphere."""
    max_iterations: Annotated[int, Ge(0)] = 10
    """Steps at most, >= 0; 0 gives the direction of the plain mean of the directions."""
    tolerance: Annotated[float, Gt(0)] = 1e-5
    """A step shorter than this is not made, in radians, > 0."""

    def __post_init__(self) -> None:
        check_bounds(self, "karcher")
        check_choices(self, "karcher")
        if self.max_iterations != int(self.max_iterations):
            raise RecipeError(f"karcher: max_iterations must be a whole number, got {self.max_iterations!r}.")

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that are no masses.

        Raises:
            RecipeError: naming the weights.
        """
        if min(weights) < 0 or max(weights) == 0:
            raise RecipeError(
                f"karcher: weights must be >= 0 and not all 0, got {tuple(weights)}. "
                "Leave an expert out rather than subtract it, or choose linear."
            )

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        self.check_weights(weights)
        products = inner_products(experts)
        return combined(experts, barycentre_coefficients(products, weights, int(self.max_iterations), self.tolerance))
