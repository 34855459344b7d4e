"""The two protocols of a merging method, and the one way an update is added to the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from merging_core.digest import canonical_json
from merging_core.statistics import Statistics, StatisticsSettings


@dataclass(frozen=True, slots=True)
class Site:
    """Where in a merge a tensor stands: what randomness and messages may depend on."""

    tensor: str
    """Name of the tensor."""
    experts: tuple[str, ...]
    """Names of the experts, in recipe order."""
    seed: int
    """The recipe's seed."""

    def generator(self, expert: str) -> torch.Generator:
        """A CPU generator that depends on seed, tensor and expert alone: not on order, shards, workers or device."""
        text = canonical_json([self.seed, self.tensor, expert])
        return torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1)


@runtime_checkable
class TensorMethod(Protocol):
    """A method that sees one named tensor of the base and of every expert."""

    @property
    def name(self) -> str:
        """Name in a recipe."""

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], site: Site) -> Tensor:
        """Merge one tensor.

        Args:
            base: any shape, compute dtype.
            experts: same shape and dtype, in recipe order.
            weights: factor on each expert, same order.
            site: which tensor of which merge this is.

        Returns:
            The merged tensor, same shape and dtype; the arguments are left as they are.
        """


@runtime_checkable
class WeightChecker(Protocol):
    """A method that has no meaning for some numbers of experts or some weights; a recipe asks before it reads."""

    def check_weights(self, weights: Sequence[float]) -> None:
        """Raise a RecipeError unless the method has a meaning for experts of these weights, in recipe order."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What a spectral method keeps of one matrix."""

    rank: int
    """Directions kept of each expert; 0 means that the matrix has too few, and updates are averaged."""
    weights: tuple[float, ...]
    """Factor on each expert's singular values, in recipe order."""


@runtime_checkable
class SpectralMethod(Protocol):
    """A method that merges the leading singular directions of each expert's update.

    Tensors that are not matrices get the mean of the updates, times ``scale``.
    """

    @property
    def name(self) -> str:
        """Name in a recipe."""

    @property
    def scale(self) -> float:
        """Factor on the merged update."""

    @property
    def embeddings(self) -> str:
        """``spectral`` or ``mean``."""

    @property
    def statistics(self) -> StatisticsSettings | None:
        """What must be measured before ``choose`` can be called; None if nothing."""

    def choose(self, max_rank: int, num_experts: int, statistics: Sequence[Statistics]) -> Directions:
        """Decide ranks and weights for one matrix.

        Args:
            max_rank: the smaller side of the matrix.
            num_experts: E >= 1.
            statistics: of each expert's update in recipe order; empty if ``statistics`` is None.
        """


def add_update(base: Tensor, update: Tensor) -> Tensor:
    """``base + update``, except that a zero update keeps the base's bits (``-0.0 + 0.0`` would lose a sign)."""
    return torch.where(update == 0, base, base + update)
