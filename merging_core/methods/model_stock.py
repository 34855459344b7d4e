"""Model Stock: as far from the base towards the mean of the experts as their angles justify."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging_core.errors import RecipeError
from merging_core.methods.base import Site, add_update
from merging_core.settings import STRICT, check_choices
from merging_core.sphere import cosines_of, inner_products


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStock:
    """Interpolate between base and mean: ``W = W_0 + t * sum_i D_i / E``, ``D_i = w_i (W_i - W_0)``.

    With ``c`` the mean over all pairs i < j of ``cos(D_i, D_j)``, each tensor a flat vector:
    ``t = max(0, E c / (1 + (E - 1) c))``. Experts that agree (c = 1) give their mean, orthogonal ones the base.

    A recipe's weight is a factor on its expert's update, in the angle (where only its sign counts) and in the mean. An
    expert of weight 0, or one that did not move, counts as orthogonal to all others.

    Numerics:
        Inner products in float64. The floor of a norm is relative, 1e-12 of the longest update: the angle, and so t,
        does not depend on the scale of the updates.

    References:
        Jang et al., Model Stock (arXiv 2403.19522).
        Deviations: t is not negative. For c < 0 the formula leads away from the mean, without bound as c nears
        -1 / (E - 1); mergekit 0.1.5 follows it there. mergekit's floor is absolute (1e-6 for a product of norms), and
        gives t = 0.34 instead of 1 for two equal updates of 1e-5; FusionBench averages angles, not cosines.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["model_stock"] = "model_stock"
    """Mean of the experts, drawn to the base by the angle between their updates."""

    def __post_init__(self) -> None:
        check_choices(self, "model_stock")

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse fewer than two experts: a single update has no angle.

        Raises:
            RecipeError: naming the number.
        """
        if len(weights) < 2:
            raise RecipeError(
                f"model_stock: experts must be two or more, got {len(weights)}: the angle between updates decides. "
                "Name another expert, or choose task_arithmetic."
            )

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        self.check_weights(weights)
        ratio = stock_ratio(inner_products(experts, base), weights)
        update = torch.zeros_like(base)
        for expert, weight in zip(experts, weights, strict=True):
            update.add_(expert - base, alpha=ratio * weight / len(experts))
        return add_update(base, update)


def stock_ratio(products: Tensor, weights: Sequence[float]) -> float:
    """``t`` of Model Stock, in [0, 1].

    Args:
        products: inner products of the E >= 2 updates.
        weights: factor on each update; its sign turns an update round.
    """
    number = len(weights)
    signs = torch.tensor(weights, dtype=torch.float64).sign()
    cosines = cosines_of(products)[0] * torch.outer(signs, signs)
    cosine = float(cosines.triu(diagonal=1).sum()) / (number * (number - 1) / 2)
    # Strict: at 0 the ratio is 0 by both branches, and a NaN must reach the merge, which names the tensor.
    return 0.0 if cosine < 0 else number * cosine / (1 + (number - 1) * cosine)
