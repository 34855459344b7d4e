"""Task arithmetic: add the sum of the updates to the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from merging_core.methods.base import Site, add_update
from merging_core.settings import STRICT, check_bounds, check_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskArithmetic:
    """Add the weighted updates: ``W = W_0 + scale * sum_i w_i (W_i - W_0)``.

    References:
        Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089).   Deviation: none.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["task_arithmetic"] = "task_arithmetic"
    """Sum of the updates, scaled."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the summed update, >= 0; 0 gives the base, 1 / number of experts the mean."""

    def __post_init__(self) -> None:
        check_bounds(self, "task_arithmetic")
        check_choices(self, "task_arithmetic")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        update = torch.zeros_like(base)
        for expert, weight in zip(experts, weights, strict=True):
            update.add_(expert - base, alpha=weight)
        return add_update(base, update.mul_(self.scale))
