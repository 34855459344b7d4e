"""Tensors as points on a sphere: inner products in one pass, a few numbers for each point, a second pass to combine.

Whatever slerp, the Riemannian barycentre and Model Stock compute lies in the span of their inputs. So E x E inner
products in float64 decide the coefficients, and no intermediate tensor is made.

Shape letters: E points.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

# Entries of each point that are held in float64 at a time.
_BLOCK: Final = 1 << 20
# A vector this much shorter than the longest has no direction. Relative: updates of 1e-8 have one.
_NORM_FLOOR: Final = 1e-12
# Below this sine an angle is 0 or pi up to the rounding of a float64 cosine.
_SINE_FLOOR: Final = 1e-7


def inner_products(points: Sequence[Tensor], origin: Tensor | None = None) -> Float[Tensor, "E E"]:
    """Inner products of all pairs of points, as flat vectors: ``<p_i - o, p_j - o>``.

    Args:
        points: E >= 1 tensors of one shape and dtype.
        origin: subtracted from each; None for zero.

    Returns:
        A symmetric float64 matrix; zeros for empty tensors.

    Numerics:
        Differences and sums in float64, block by block: no whole tensor is widened.
    """
    flat = [point.reshape(-1) for point in points]
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), _BLOCK):
        block = torch.stack([point[start : start + _BLOCK].to(torch.float64) for point in flat])
        if origin is not None:
            block -= origin.reshape(-1)[start : start + _BLOCK].to(torch.float64)
        products += (block @ block.T).cpu()
    return products


def cosines_of(products: Float[Tensor, "E E"]) -> tuple[Float[Tensor, "E E"], Float[Tensor, " E"]]:
    """Cosines of all pairs, and norms.

    Args:
        products: from :func:`inner_products`.

    Returns:
        Cosines in [-1, 1], 0 in the row and column of a point without a direction, and norms, 0 for such a point. A
        point has none if its norm is 0 or below ``1e-12`` of the longest.
    """
    norms = products.diagonal().sqrt()
    norms = torch.where(norms <= _NORM_FLOOR * norms.max(), 0.0, norms)
    lengths = torch.outer(norms, norms)
    return torch.where(lengths == 0, 0.0, products / lengths).clamp(-1, 1), norms


def slerp_coefficients(products: Float[Tensor, "2 2"], t: float, straight_above: float) -> tuple[float, float]:
    """Factors of two points on the great circle between them.

    With ``theta`` the angle between the points: ``sin((1 - t) theta) / sin(theta)`` and ``sin(t theta) / sin(theta)``.

    Args:
        products: of the two points.
        t: position, in [0, 1].
        straight_above: where ``|cos theta|`` is above it, the factors are those of the straight line, in [0, 1].

    Returns:
        The factors; ``(1 - t, t)`` also for points without a direction, and for parallel or opposite ones, between
        which no great circle, or no single one, leads.
    """
    cosines, norms = cosines_of(products)
    cosine = float(cosines[0, 1])
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if float(norms.min()) == 0 or abs(cosine) > straight_above or sine <= _SINE_FLOOR:
        return 1 - t, t
    # Exact at both ends: one factor is x / x, the other sin(0).
    angle = math.atan2(sine, cosine)
    whole = math.sin(angle)
    return math.sin((1 - t) * angle) / whole, math.sin(t * angle) / whole


def barycentre_coefficients(
    products: Float[Tensor, "E E"], weights: Sequence[float], max_iterations: int, tolerance: float
) -> list[float]:
    """Factors of the points whose sum is their Riemannian barycentre, at the weighted mean of their norms.

    With ``u_i = p_i / |p_i|`` and ``a_i = w_i / sum_j w_j``: from ``u = sum_i a_i u_i``, normalised, repeat
    ``u <- exp_u(sum_i a_i log_u(u_i))``. The result is ``(sum_i a_i |p_i|) u``.

    Args:
        products: of the points.
        weights: >= 0 with a positive sum.
        max_iterations: steps at most, >= 0.
        tolerance: a step shorter than this, in radians, is not made, > 0.

    Returns:
        One factor for each point.

    Numerics:
        In float64 on coefficients. A point opposite to ``u`` has no logarithm and pulls nowhere; where the mean
        vanishes the first point of the largest weight is the start. A point without a direction counts for the norm.
    """
    cosines, norms = cosines_of(products)
    shares = torch.tensor(weights, dtype=torch.float64)
    radius = float((shares * norms).sum() / shares.sum())
    shares = torch.where(norms == 0, 0.0, shares)
    if radius == 0:
        return [0.0] * len(norms)
    shares = shares / shares.sum()
    centre = shares
    if (length := _length(centre, cosines)) <= _SINE_FLOOR:
        centre, length = (torch.arange(len(norms)) == shares.argmax()).to(torch.float64), 1.0
    centre = centre / length
    for _ in range(max_iterations):
        cosine = (cosines @ centre).clamp(-1, 1)
        sine = (1 - cosine.square()).sqrt()
        # The logarithm is theta / sin(theta) times the part of u_i orthogonal to u: none at u and opposite to it.
        pull = shares * torch.where(sine <= _SINE_FLOOR, 0.0, torch.acos(cosine) / sine)
        tangent = pull - (pull * cosine).sum() * centre
        step = _length(tangent, cosines)
        if step < tolerance:
            break
        centre = math.cos(step) * centre + math.sin(step) / step * tangent
        centre = centre / _length(centre, cosines)
    return [float(factor) for factor in torch.where(norms == 0, 0.0, radius * centre / norms)]


def combined(points: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """``sum_i c_i p_i`` in the points' own dtype; a single factor of 1 among zeros gives that point bit for bit."""
    first = next((at for at, factor in enumerate(factors) if factor != 0), 0)
    total = points[first] * factors[first]
    for at, (point, factor) in enumerate(zip(points, factors, strict=True)):
        if at == first:
            continue
        if factor != 0:
            total.add_(point, alpha=factor)
        else:
            # -0.0 + 0.0 would lose a sign, and skipping the point would hide a NaN.
            term = point * factor
            total = torch.where(term == 0, total, total + term)
    return total


def _length(factors: Float[Tensor, " E"], cosines: Float[Tensor, "E E"]) -> float:
    # Cancellation may leave a square of -1e-17.
    return math.sqrt(max(float(factors @ cosines @ factors), 0.0))
