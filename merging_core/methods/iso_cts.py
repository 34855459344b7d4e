"""Iso-CTS: the common directions of the sum, each expert's own ones beside them, one even spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from merging_core.methods.base import Site, add_update
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.spectral import RELATIVE_FLOOR, Spectrum, combine, leading_triplets
from merging_core.updates import is_matrix, mean_update, noise_floor, real_directions, weighted_update


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoCts:
    """Isotropic merging in common and task-specific subspaces.

    For each matrix, with ``D_i = w_i (W_i - W_0)``, E experts and ``r = min(M, N)``: each expert has
    ``k = round((r - floor(common_fraction * r)) / E)`` directions of its own, ``c = r - E k`` are common. ``U_c, s_c,
    V_c`` are the leading c of ``sum_i D_i``, ``U_i, s_i, V_i`` the leading k of ``(I - U_c U_c^T) D_i``. With
    ``U = [U_1 .. U_E U_c]``, ``V`` and ``s`` likewise: ``W = W_0 + scale * mean(s) polar(U) polar(V)^T``. Other
    tensors: the mean of the weighted updates, times scale. A recipe's weight is a factor on its expert's update.

    Numerics:
        Decompositions and polar factors in float64; halves are rounded to the even number. Directions at the rounding
        floor of the narrowest dtype that holds the experts, and below 1e-6 of the expert's update, are not directions.

    References:
        Marczak et al., No Task Left Behind (arXiv 2502.04959), Iso-CTS; sizes of the subspaces as FusionBench 0.2.33.
        Deviations: missing directions (rank-deficient updates) and shared ones (identical experts) are left out; the
        mean is that of the others; k is at most floor(r / E), where rounding up would make c negative.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["iso_cts"] = "iso_cts"
    """Common and task-specific directions with all singular values equal."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Factor on the merged update, >= 0."""
    common_fraction: Annotated[float, Ge(0), Le(1)] = 0.8
    """Fraction of the directions that are taken from the sum, in [0, 1]; the rest is shared out among the experts."""

    def __post_init__(self) -> None:
        check_bounds(self, "iso_cts")
        check_choices(self, "iso_cts")

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor; see :class:`~merging_core.methods.base.TensorMethod`."""
        if not is_matrix(base):
            return add_update(base, mean_update(base, experts, weights).mul_(self.scale))
        updates = [
            weighted_update(base, expert, weight, site.tensor, name)
            for expert, weight, name in zip(experts, weights, site.experts, strict=True)
        ]
        num_common, num_own = self.split(min(base.shape), len(experts))
        common = real_directions(torch.stack(updates).sum(dim=0), num_common, noise_floor(experts, weights))
        parts = []
        for update, expert, weight in zip(updates, experts, weights, strict=True):
            remainder = update - common.left @ (common.left.T @ update)
            # What the common directions leave of a low-rank update is rounding: of the stored dtype, or of float64.
            floor = max(noise_floor([expert], [weight]), RELATIVE_FLOOR * float(torch.linalg.matrix_norm(update)))
            parts.append(leading_triplets(remainder, num_own, floor))
        parts.append(common)
        if not sum(part.rank for part in parts):
            return base.clone()
        mean = torch.cat([part.spectrum for part in parts]).mean() * self.scale
        even = [Spectrum(part.left, mean.expand(part.rank), part.right_t) for part in parts]
        return add_update(base, combine(even, [1.0] * len(even)).update.to(base.dtype))

    def split(self, max_rank: int, num_experts: int) -> tuple[int, int]:
        """Numbers of common directions, and of directions of each expert's own, together ``max_rank``."""
        wanted = round((max_rank - int(max_rank * self.common_fraction)) / num_experts)
        num_own = min(wanted, max_rank // num_experts)
        return max_rank - num_experts * num_own, num_own
