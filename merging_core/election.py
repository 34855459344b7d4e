"""Combining sparse updates: a weighted sum, or an election of signs and the mean of those that agree with it."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from merging_core.errors import RecipeError

# Decimal weights that cancel on paper leave about 1e-16 of their size.
_CANCELLED: Final = 1e-12


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float], divisor: float) -> Tensor:
    """``sum_i w_i E_i / divisor``."""
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight / divisor)
    return total


def sum_of_weights(weights: Sequence[float], subject: str) -> float:
    """The sum, to divide by.

    Raises:
        RecipeError: if the weights cancel, up to rounding.
    """
    total = math.fsum(weights)
    if abs(total) <= _CANCELLED * math.fsum(map(abs, weights)):
        raise RecipeError(f"{subject}: the weights must not sum to 0. Change a weight or set normalize: false.")
    return total


def elected_sum(
    parts: Sequence[Tensor], weights: Sequence[float], *, weight_in_election: bool, normalize: bool
) -> Tensor:
    """Elect a sign for every entry and add up the updates that have it.

    ``s = +1 if sum_i B_i >= 0 else -1``, ``A_i = [sign(B_i) = s]`` (a zero never agrees), ``B_i = w_i E_i``, or ``E_i``
    without weights in the election; the result is ``sum_i A_i w_i E_i``, with ``normalize`` divided by
    ``sum_i A_i w_i``.

    Args:
        parts: updates E_i of the experts, equal shapes, float32 or float64.
        weights: factor on each, same order.
        weight_in_election: whether a heavier expert has more of a say.
        normalize: mean of those that agree instead of their sum.

    Returns:
        A tensor like each part; 0 where none agrees.

    Numerics:
        Ballots are summed in float64, or the order of the experts would decide close elections. Weights of both signs
        may cancel among those that agree: there the sum is not divided.

    References:
        Yadav et al., TIES-Merging (arXiv 2306.01708).
        Deviation: exact cancellation elects +; weights are not part of the paper.
    """
    weighted = [part if weight == 1 else part * weight for part, weight in zip(parts, weights, strict=True)]
    ballots = weighted if weight_in_election else parts
    outcome = torch.zeros_like(parts[0], dtype=torch.float64)
    for ballot in ballots:
        outcome += ballot
    # Not strict: exact cancellation elects +.
    sign = (outcome >= 0).to(parts[0].dtype).mul_(2).sub_(1)
    total = torch.zeros_like(parts[0])
    # Weights of one sign cannot cancel, and a small one of them is no rounding error.
    mixed = min(weights) < 0 < max(weights)
    divisor = torch.zeros_like(outcome if mixed else total)
    for ballot, own, weight in zip(ballots, weighted, weights, strict=True):
        # Strict: a zero has no sign to agree with.
        agrees = ballot * sign > 0
        total += own * agrees
        if normalize:
            divisor.add_(agrees, alpha=weight)
    if not normalize:
        return total
    floor = _CANCELLED * math.fsum(map(abs, weights)) if mixed else 0.0
    return total.div(divisor.masked_fill_(divisor.abs() <= floor, 1.0)).to(total.dtype)
