"""Slerp: a point on the great circle between two checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from merging_core.errors import RecipeError
from merging_core.methods.base import Site
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.sphere import combined, inner_products, slerp_coefficients


@dataclass(frozen=True, kw_only=True, slots=True)
class Slerp:
    """Spherical interpolation: ``W = (sin((1 - t') theta) A + sin(t' theta) B) / sin(theta)``.

    ``theta`` is the angle between A and B, each tensor a flat vector. With one expert A is the base and B the expert;
    with two, A is the first and B the second, and the base is only the reference for names and shapes. ``t' = 0`` is A
    and ``t' = 1`` is B, bit for bit.

    A recipe's weights are odds: ``t' = t w_B / ((1 - t) w_A + t w_B)``, the base's weight being 1. With weights 1,
    ``t' = t``; with ``t`` = 0.5, ``t' = w_B / (w_A + w_B)``.

    Numerics:
        Inner products and angle in float64. On the straight line instead, where ``|cos(theta)|`` is above
        ``straight_above``, where A and B are opposite, or where one of them is zero: finite in every case. At the
        default the two differ by less than 7e-5 of the norm for nearly parallel tensors.

    References:
        Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985); as a merge: Goddard et al., Arcee's
        MergeKit (arXiv 2403.13257).
        Deviation: mergekit 0.1.5 puts a zero tensor at a right angle to every other; here the line is straight.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["slerp"] = "slerp"
    """Great circle from the base to one expert, or from the first of two experts to the second."""
    t: Annotated[float, Ge(0), Le(1)] = 0.5
    """Position, in [0, 1]: 0 is the base (or the first of two experts), 1 the last expert."""
    straight_above: Annotated[float, Ge(0), Le(1)] = 0.9995
    """Magnitude of the cosine, in [0, 1], above which the straight line is taken; 1: only where no great circle is."""

    def __post_init__(self) -> None:
        check_bounds(self, "slerp")
        check_choices(self, "slerp")

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse other numbers of experts than one or two, and weights that are not odds.

        Raises:
            RecipeError: naming the number or the weights.
        """
        if len(weights) not in (1, 2):
            raise RecipeError(
                f"slerp: experts must be one (base to expert) or two (first to second), got {len(weights)}. "
                "Choose karcher, which takes any number."
            )
        self.position(weights)

    def position(self, weights: Sequence[float]) -> float:
        """``t'``, in [0, 1], from the weights of one or two experts.

        Raises:
            RecipeError: if a weight is negative or both ends have none.
        """
        first, second = (1.0, *weights)[-2:]
        start, end = (1 - self.t) * first, self.t * second
        if min(first, second) < 0 or start + end == 0:
            raise RecipeError(
                f"slerp: weights must be >= 0 and leave one end a share at t {self.t:g}, got {tuple(weights)}. "
                "Keep weight 1 and choose t."
            )
        return end / (start + end)

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        self.check_weights(weights)
        ends = (base, *experts)[-2:]
        return combined(ends, slerp_coefficients(inner_products(ends), self.position(weights), self.straight_above))
