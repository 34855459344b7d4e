"""What R-TSVM asks of one update: its norm, the mass of its outliers, its sparsity; and the noise floor of a dtype."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from merging_core.settings import STRICT, check_bounds, check_choices

Scope = Literal["matrix", "row", "column"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsSettings:
    """How outliers and sparsity are counted."""

    __pydantic_config__: ClassVar = STRICT
    cut: Annotated[float, Ge(0)] = 3.0
    """Distance of an outlier from the mean magnitude, in standard deviations, >= 0."""
    scope: Scope = "matrix"
    """Over what mean and standard deviation are taken: the whole matrix, each row or each column."""
    near_zero: Annotated[float, Ge(0)] = 0.1
    """An entry counts as zero up to this fraction of the matrix's root mean square, >= 0."""

    def __post_init__(self) -> None:
        check_bounds(self, "statistics")
        check_choices(self, "statistics")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Measured on one update of one expert."""

    norm: float
    """Frobenius norm."""
    outlier_mass: float
    """Sum of the outliers' magnitudes, >= 0."""
    sparsity: float
    """Fraction of entries that are nearly zero, in [0, 1]; 1 for a zero update."""


def measure(update: Float[Tensor, "M N"], settings: StatisticsSettings) -> Statistics:
    """Measure one update; see :class:`Statistics`."""
    return Statistics(
        norm=float(torch.linalg.vector_norm(update, dtype=torch.float64)),
        outlier_mass=float(outlier_mass(update, settings.cut, settings.scope)),
        sparsity=sparsity(update, settings.near_zero),
    )


def outlier_mass(update: Float[Tensor, "M N"], cut: float, scope: Scope = "matrix") -> Float[Tensor, ""]:
    """Sum the magnitudes that stand out within one update.

    With ``A = |update|``: the sum of ``A_ij`` over ``A_ij > mean(A) + cut * std(A)``, mean and std over the scope.

    Args:
        update: task vector of one matrix, any real dtype.
        cut: distance from the mean in standard deviations, >= 0.
        scope: over what mean and std are taken.

    Returns:
        A 0-d float64 tensor, >= 0; 0 for an empty update.

    Numerics:
        Statistics in float64: in float32 the mean of a constant matrix can round below its entries, and with
        ``cut = 0`` all of them would count. Population std: a single entry gives 0, not NaN.

    References:
        Tripoise, docs/method.md, "Outlier-aware weighting".   Deviation: the definition is ours.
    """
    magnitude = update.abs().to(torch.float64)
    if not magnitude.numel():
        return magnitude.sum()
    dims = {"matrix": (0, 1), "row": (1,), "column": (0,)}[scope]
    std, mean = torch.std_mean(magnitude, dim=dims, correction=0, keepdim=True)
    # Strict: with >= every entry of a constant update would stand out.
    return torch.where(magnitude > mean + cut * std, magnitude, 0.0).sum()


def sparsity(update: Float[Tensor, "M N"], near_zero: float) -> float:
    """Fraction of entries with ``|x| <= near_zero * rms(update)``, in [0, 1]; 1 for a zero or empty update.

    References:
        Tripoise, docs/method.md, "Sparsity-adaptive rank".   Deviation: the definition is ours.
    """
    if not update.numel():
        return 1.0
    magnitude = update.abs().to(torch.float64)
    cut = near_zero * math.sqrt(float(magnitude.square().mean()))
    return float((magnitude <= cut).to(torch.float64).mean())


def rounding_floor(stored: Float[Tensor, "M N"]) -> float:
    """Largest singular value that rounding to the stored dtype alone puts into an update.

    ``1.1 * e * (sqrt(M) + sqrt(N))`` with ``e = sqrt(mean(ulp(W)^2) / 12)``, the standard deviation of rounding ``W``.

    Args:
        stored: the expert's matrix in its stored floating dtype.

    Returns:
        The floor, >= 0. Directions at or below it are not directions: a low-rank update stored in bfloat16 looks
        full-rank otherwise, and the noise decides the merge.

    References:
        Edge of the spectrum of a random matrix (Marchenko and Pastur, 1967); the factor 1.1 was checked on synthetic
        updates (512 x 1024, rank 16: predicted edge 1.82e-3, first noise value 1.8e-3).   Deviation: the rule is ours.
    """
    if not stored.numel():
        return 0.0
    _, exponent = torch.frexp(stored.to(torch.float64))
    # frexp has its mantissa in [0.5, 1): the unit in the last place is eps * 2^(exponent - 1). Zeros round exactly.
    ulp = torch.where(stored == 0, 0.0, torch.finfo(stored.dtype).eps * torch.exp2(exponent.to(torch.float64) - 1))
    rows, cols = stored.shape
    return 1.1 * math.sqrt(float(ulp.square().mean()) / 12) * (math.sqrt(rows) + math.sqrt(cols))
