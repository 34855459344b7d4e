"""WUDI: move the summed update until it interferes least with every expert's own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from merging_core.errors import RecipeError
from merging_core.methods.base import Site, add_update
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.updates import is_matrix, mean_update

# Adam as Kingma and Ba give it, and as every published variant uses it.
_BETA_1: Final = 0.9
_BETA_2: Final = 0.999
_EPSILON: Final = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Wudi:
    """Data-free merging guided by task vectors.

    For each matrix, with ``D_i = w_i (W_i - W_0)``: ``W = W_0 + scale * tau``, tau after ``iterations`` steps of Adam
    from ``sum_i D_i`` on ``sum_i |(tau - D_i) D_i^T|^2 / |D_i|^2`` (Frobenius norms). Other tensors: the mean of the
    weighted updates, times scale. A recipe's weight is a factor on its expert's update.

    Three variants are published and not interchangeable. The authors' vision code divides by ``|D_i|``, runs 300 steps
    at 1e-5 and leaves all but attention and MLP matrices at the base; their language code divides by ``|D_i|^2``, 300
    steps at 2e-5; FusionBench divides by ``|D_i|^2``, 300 steps (400 in its configuration) at 1e-5, every matrix, other
    tensors averaged. This is FusionBench's.

    Numerics:
        ``learning_rate`` is absolute, and Adam moves an entry by about that much a step whatever the gradient: scaling
        the updates does **not** scale the result. The gradient ``2 sum_i (tau - D_i) D_i^T D_i / |D_i|^2`` is
        written as ``2 (C + (tau - sum_j D_j) H)``: a step costs one product however many the experts, and nothing
        cancels. In the compute dtype; gradients at the level of its rounding are noise, which Adam follows.

    References:
        Cheng et al., Whoever Started the Interference Should End It (arXiv 2503.08099).
        Deviation: that of FusionBench 0.2.33; an update of zero has no term (there: 0 / 0).
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["wudi"] = "wudi"
    """Sum of the updates, optimised to interfere least with each of them."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the merged update, >= 0."""
    iterations: Annotated[int, Ge(0)] = 300
    """Steps of Adam, >= 0; 0 gives the sum of the updates."""
    learning_rate: Annotated[float, Gt(0)] = 1e-5
    """Step size of Adam, absolute, > 0."""

    def __post_init__(self) -> None:
        check_bounds(self, "wudi")
        check_choices(self, "wudi")
        if self.iterations != int(self.iterations):
            raise RecipeError(f"wudi: iterations must be a whole number, got {self.iterations!r}.")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        if not is_matrix(base):
            return add_update(base, mean_update(base, experts, weights).mul_(self.scale))
        updates = [(expert - base).mul_(weight) for expert, weight in zip(experts, weights, strict=True)]
        total = torch.zeros_like(base)
        for update in updates:
            total += update
        total += descend(interference_gradient(total, updates), total, int(self.iterations), self.learning_rate)
        return add_update(base, total.mul_(self.scale))


def interference_gradient(
    start: Float[Tensor, "M N"], updates: Sequence[Float[Tensor, "M N"]]
) -> Callable[[Tensor], Tensor]:
    """Gradient of the interference as a function of the distance from ``start``.

    ``x -> 2 (C + x H)``, ``C = sum_i (start - D_i) D_i^T D_i / |D_i|^2``, ``H = sum_i D_i^T D_i / |D_i|^2``.

    Args:
        start: where x is 0.
        updates: E matrices; those that are zero have no part.
    """
    norms = [float(torch.linalg.vector_norm(update, dtype=torch.float64)) for update in updates]
    # Unit matrices: squares of small updates would underflow in float32. NaN stays, for the merge to name.
    units = [(update, update / norm) for update, norm in zip(updates, norms, strict=True) if norm != 0]
    constant = torch.zeros_like(start)
    for update, unit in units:
        constant += ((start - update) @ unit.T) @ unit
    factor = torch.cat([unit for _, unit in units]) if units else start[:0]
    # H is N x N; for a wide matrix with few rows its factor, E M x N, is the smaller.
    square = factor.T @ factor if factor.shape[1] <= 2 * factor.shape[0] else None

    def gradient(x: Tensor) -> Tensor:
        return 2 * (constant + (x @ square if square is not None else (x @ factor.T) @ factor))

    return gradient


def descend(gradient: Callable[[Tensor], Tensor], like: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """Run Adam from zero.

    Args:
        gradient: of the loss, as a function of the distance from the start.
        like: gives shape and dtype.
        iterations: number of steps.
        learning_rate: step size.

    Returns:
        The distance from the start after the last step.

    References:
        Kingma and Ba, Adam (arXiv 1412.6980), Algorithm 1.   Deviation: none.
    """
    x, mean, square = (torch.zeros_like(like) for _ in range(3))
    for step in range(1, iterations + 1):
        slope = gradient(x)
        mean.lerp_(slope, 1 - _BETA_1)
        square.mul_(_BETA_2).addcmul_(slope, slope, value=1 - _BETA_2)
        spread = (square.sqrt() / math.sqrt(1 - _BETA_2**step)).add_(_EPSILON)
        x.addcdiv_(mean, spread, value=-learning_rate / (1 - _BETA_1**step))
    return x
