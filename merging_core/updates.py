"""Updates of one tensor, weighted, and the noise that rounding put into them."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from merging_core.spectral import Spectrum, leading_triplets
from merging_core.statistics import rounding_floor
from merging_core.task_vectors import require_finite

# Narrowest first.
_STORED: Final = (torch.bfloat16, torch.float16, torch.float32)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has singular vectors: two-dimensional and not empty."""
    return tensor.dim() == 2 and tensor.numel() > 0


def mean_update(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i (W_i - W_0) / E`` in the dtype of the base: for tensors that are not matrices."""
    update = torch.zeros_like(base)
    for expert, weight in zip(experts, weights, strict=True):
        update.add_(expert - base, alpha=weight / len(experts))
    return update


def weighted_update(base: Tensor, expert: Tensor, weight: float, tensor: str, name: str) -> Tensor:
    """``w_i (W_i - W_0)`` in float64, ready to be decomposed.

    Raises:
        NumericalError: if it is not finite, naming the tensor and the checkpoint at fault.
    """
    update = (expert.to(torch.float64) - base.to(torch.float64)).mul_(weight)
    if not torch.isfinite(update).all():
        require_finite(tensor, base, "the base")
        require_finite(tensor, expert, f"expert {name!r}")
    return update


def noise_floor(experts: Sequence[Tensor], weights: Sequence[float]) -> float:
    """Largest singular value that rounding the experts' matrices puts into the weighted sum of their updates.

    ``sqrt(sum_i (w_i f_i)^2)`` with ``f_i`` the rounding floor of expert i: the roundings are independent.

    Args:
        experts: matrices in the compute dtype.
        weights: factor on each.

    Returns:
        The floor, >= 0.

    Numerics:
        A method sees the compute dtype. Values that all fit bfloat16 or float16 were rounded to it, wherever they are
        stored now, so the narrowest dtype that holds the matrix decides.

    References:
        merging_core/statistics.py, rounding_floor.   Deviation: the rule is ours.
    """
    return math.hypot(*(weight * _floor(expert) for expert, weight in zip(experts, weights, strict=True)))


def _floor(expert: Float[Tensor, "M N"]) -> float:
    for dtype in _STORED:
        narrow = expert.to(dtype)
        if torch.equal(narrow.to(expert.dtype), expert):
            return rounding_floor(narrow)
    return rounding_floor(expert)


def real_directions(update: Float[Tensor, "M N"], rank: int, noise: float) -> Spectrum:
    """The leading singular triplets above the rounding noise.

    Args:
        update: finite.
        rank: how many at most.
        noise: from :func:`noise_floor`.

    Returns:
        At most ``rank`` triplets. Where noise would leave nothing (a few weights moved by one unit in the last place)
        what is there is kept: no update vanishes silently.
    """
    found = leading_triplets(update, rank, noise)
    return found if found.rank else leading_triplets(update, rank)
