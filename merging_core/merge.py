"""The merge itself: one tensor at a time from the inputs to the output folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from merging_core.checkpoint import MAX_SHARD_BYTES, Checkpoint, TensorInfo, natural_order, write_checkpoint
from merging_core.compatibility import check_compatible, own_tensors
from merging_core.errors import IncompatibleError, NumericalError
from merging_core.methods.base import Site, SpectralMethod, TensorMethod, add_update
from merging_core.recipe import DTYPES, Recipe
from merging_core.spectral import combine
from merging_core.statistics import Statistics
from merging_core.task_vectors import TaskVectors, read_statistics, require_finite
from merging_core.threads import one_torch_thread

_FLOAT64_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class MatrixDiagnostics:
    """What a spectral method did with one matrix."""

    tensor: str
    ranks: dict[str, int]
    """Expert to directions kept."""
    weights: dict[str, float]
    """Expert to the factor on its singular values."""
    num_null: int
    """Directions dropped because experts share them."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the inputs of a merge lie."""

    base: Path
    experts: Mapping[str, Path]
    """Expert name to checkpoint folder."""
    vectors: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to task-vectors folder; needed by spectral methods."""
    statistics: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to statistics folder; needed where the method asks for them."""


def merge(
    recipe: Recipe,
    inputs: Inputs,
    out: Path,
    progress: Callable[[int], None] = lambda num_bytes: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[MatrixDiagnostics]:
    """Write the merged weights into an existing folder.

    Every tensor of the base is merged or, if it is not a floating-point tensor, copied after checking that all experts
    agree. Same inputs give the same bytes, whatever their shard layout.

    Args:
        recipe: what to merge, how and in which precision.
        inputs: where the checkpoints and what was computed from them lie.
        out: existing folder for the safetensors files.
        progress: called with the bytes of each tensor written.
        max_shard_bytes: size at which a new output shard is begun.

    Returns:
        For spectral methods, ranks and weights of each matrix, in the order of the layers; else nothing.

    Raises:
        IncompatibleError: if the checkpoints do not fit together, or a tensor that is only copied differs.
        NumericalError: if a merged tensor is not finite.
    """
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint(inputs.base, "the base"))
        experts = {
            name: stack.enter_context(Checkpoint(folder, f"expert {name!r}")) for name, folder in inputs.experts.items()
        }
        expected = check_compatible(base, experts)
        job: _TensorJob | _SpectralJob
        if isinstance(recipe.method, SpectralMethod):
            vectors = [
                stack.enter_context(TaskVectors(inputs.vectors[expert.name], expert.name)) for expert in recipe.experts
            ]
            measured = (
                [read_statistics(inputs.statistics[expert.name]) for expert in recipe.experts]
                if recipe.method.statistics
                else []
            )
            job = _SpectralJob(recipe, recipe.method, base, vectors, measured)
        else:
            job = _TensorJob(recipe, recipe.method, base, [experts[expert.name] for expert in recipe.experts])
        layout = {name: TensorInfo(_stored_dtype(recipe, info), info.shape) for name, info in expected.items()}

        def compute(name: str) -> Tensor:
            if not expected[name].dtype.is_floating_point:
                return _copied(name, base, experts)
            merged = job.compute(name).to(layout[name].dtype)
            # 8-bit floats have no isfinite of their own; a float64 may lie beyond the range of float32.
            wide = merged.to(torch.float32) if merged.dtype.itemsize == 1 else merged
            if not torch.isfinite(wide).all():
                _explain(name, recipe, [base, *experts.values()], layout[name].dtype)
            return merged

        stack.enter_context(one_torch_thread())
        # Singular directions are worth several threads; other methods wait for the disk, and their inputs are large.
        num_workers = (os.cpu_count() or 1) if isinstance(job, _SpectralJob) else 1
        write_checkpoint(
            out, layout, compute, max_shard_bytes=max_shard_bytes, num_workers=num_workers, written=progress
        )
        return sorted(job.diagnostics, key=lambda one: natural_order(one.tensor))


def merged_bytes(recipe: Recipe, base: Checkpoint) -> int:
    """Size of the merged weights on disk, in bytes."""
    return sum(TensorInfo(_stored_dtype(recipe, info), info.shape).num_bytes for info in own_tensors(base).values())


class _TensorJob:
    """Compute tensors of a method that sees the checkpoints."""

    def __init__(self, recipe: Recipe, method: TensorMethod, base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
        self.diagnostics: list[MatrixDiagnostics] = []
        self._recipe, self._method, self._base, self._experts = recipe, method, base, experts

    def compute(self, name: str) -> Tensor:
        loaded = [checkpoint.load(name) for checkpoint in (self._base, *self._experts)]
        base, *experts = (tensor.to(_compute_dtype(self._recipe, loaded)) for tensor in loaded)
        site = Site(name, tuple(expert.name for expert in self._recipe.experts), self._recipe.seed)
        return self._method.merge(base, experts, self._recipe.weights, site)


class _SpectralJob:
    """Compute tensors of a method that sees singular directions."""

    def __init__(
        self,
        recipe: Recipe,
        method: SpectralMethod,
        base: Checkpoint,
        vectors: Sequence[TaskVectors],
        statistics: Sequence[Mapping[str, Statistics]],
    ) -> None:
        self.diagnostics: list[MatrixDiagnostics] = []
        self._recipe, self._method, self._base = recipe, method, base
        self._vectors, self._statistics = vectors, statistics

    def compute(self, name: str) -> Tensor:
        base = self._base.load(name)
        base = base.to(_compute_dtype(self._recipe, [base]))
        update = self._update(name, min(base.shape, default=0))
        return add_update(base, (update * self._method.scale).to(base.dtype))

    def _update(self, name: str, max_rank: int) -> Tensor:
        weights = self._recipe.weights
        if self._vectors[0].is_decomposed(name):
            measured = [statistics[name] for statistics in self._statistics]
            chosen = self._method.choose(max_rank, len(self._vectors), measured)
            weights = tuple(own * factor for own, factor in zip(weights, chosen.weights, strict=True))
            if chosen.rank:
                spectra = [vectors.spectrum(name, chosen.rank) for vectors in self._vectors]
                combined = combine(spectra, weights)
                names = [vectors.expert for vectors in self._vectors]
                ranks = dict(zip(names, (part.rank for part in spectra), strict=True))
                self.diagnostics.append(
                    MatrixDiagnostics(name, ranks, dict(zip(names, weights, strict=True)), combined.num_null)
                )
                return combined.update
        updates = [
            vectors.update(name).to(torch.float64) * weight
            for vectors, weight in zip(self._vectors, weights, strict=True)
        ]
        return torch.stack(updates).mean(dim=0)


def _stored_dtype(recipe: Recipe, info: TensorInfo) -> torch.dtype:
    return DTYPES[recipe.dtype] if recipe.dtype and info.dtype.is_floating_point else info.dtype


def _compute_dtype(recipe: Recipe, tensors: Sequence[Tensor]) -> torch.dtype:
    wide = recipe.compute_dtype == "float64" or any(tensor.dtype.itemsize >= _FLOAT64_BYTES for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _copied(name: str, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Tensor:
    tensor = base.load(name)
    if differing := [
        expert for expert, checkpoint in experts.items() if not torch.equal(checkpoint.load(name), tensor)
    ]:
        raise IncompatibleError(
            f"{name!r}: {tensor.dtype} cannot be merged and must be equal in all checkpoints; "
            f"it differs in {differing}. Name experts that left it as it is."
        )
    return tensor


def _explain(name: str, recipe: Recipe, inputs: Sequence[Checkpoint], dtype: torch.dtype) -> None:
    """Raise the NumericalError that says which input is broken, or that the result does not fit its dtype."""
    for checkpoint in inputs:
        require_finite(name, checkpoint.load(name), checkpoint.name)
    raise NumericalError(
        f"{name!r}: the merge by {recipe.method.name} leaves the range of {dtype}. "
        "Lower the scale or store a wider dtype."
    )
