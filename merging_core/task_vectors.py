"""Task vectors as a step of their own: decompose one expert's updates, measure them, read them back."""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from threading import Lock
from typing import Annotated, ClassVar, Final, Literal, Self

import torch
from annotated_types import Gt, Le
from torch import Tensor

from merging_core.checkpoint import Checkpoint, TensorInfo, write_checkpoint
from merging_core.compatibility import check_compatible, vocabulary_size
from merging_core.errors import CheckpointError, NumericalError, RecipeError
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.spectral import Spectrum, leading_triplets
from merging_core.statistics import Statistics, StatisticsSettings, measure, rounding_floor
from merging_core.threads import one_torch_thread

# Raise them, with a bold line in CHANGELOG.md, whenever the same inputs give other bytes.
DECOMPOSE_VERSION: Final = 1
STATISTICS_VERSION: Final = 1
STATISTICS_FILE: Final = "statistics.json"
# Small sides are stored in full, so that a matrix with fewer directions than experts can be averaged.
_FULL_BELOW: Final = 16
_LEFT, _SPECTRUM, _RIGHT = ":left", ":spectrum", ":right_t"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecomposeSettings:
    """What is kept of an expert's updates."""

    __pydantic_config__: ClassVar = STRICT
    rank_fraction: Annotated[float, Gt(0), Le(1)] = 0.5
    """Fraction of each matrix's directions that are stored, in (0, 1]; half is enough for any two or more experts."""
    embeddings: Literal["spectral", "mean"] = "spectral"
    """Input embedding and output head: store singular vectors, or the update as it is."""

    def __post_init__(self) -> None:
        check_bounds(self, "decompose")
        check_choices(self, "decompose")


def is_matrix(info: TensorInfo, vocab_size: int | None, embeddings: str) -> bool:
    """Whether a tensor is merged by its singular vectors: two-dimensional, floating, and not an excluded embedding.

    Embeddings and output heads are recognised by their first dimension, the config's vocabulary size.
    """
    if len(info.shape) != 2 or not info.dtype.is_floating_point or 0 in info.shape:
        return False
    return embeddings == "spectral" or info.shape[0] != vocab_size


def decompose(
    base: Checkpoint,
    expert: Checkpoint,
    settings: DecomposeSettings,
    out: Path,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write one expert's task vector: leading singular triplets of each matrix, the update of every other tensor.

    Args:
        base: what the expert started from.
        expert: same names, shapes, architecture and vocabulary.
        settings: what is kept.
        out: existing folder.
        progress: called with the bytes of the expert that were done.

    Raises:
        IncompatibleError: if the two do not fit together.
        RecipeError: if embeddings are to be excluded but the config does not tell how to know them.
        NumericalError: if an update is not finite.

    Numerics:
        Updates and triplets in float64, stored as float32. Directions below the rounding floor of the expert's dtype
        are stored as zeros and dropped on reading; see :func:`_directions` for when the floor does not apply.
    """
    expected = check_compatible(base, {expert.name: expert})
    vocab_size = vocabulary_size(base)
    if vocab_size is None and settings.embeddings == "mean":
        raise RecipeError(
            f"embeddings: mean needs the vocab_size of {base.name}, and its config.json has none. "
            "Add it there, or choose embeddings: spectral."
        )
    layout: dict[str, TensorInfo] = {}
    for name, info in expected.items():
        if is_matrix(info, vocab_size, settings.embeddings):
            rows, cols = info.shape
            rank = stored_rank(min(rows, cols), settings.rank_fraction)
            layout[name + _LEFT] = TensorInfo(torch.float32, (rows, rank))
            layout[name + _SPECTRUM] = TensorInfo(torch.float32, (rank,))
            layout[name + _RIGHT] = TensorInfo(torch.float32, (rank, cols))
        elif info.dtype.is_floating_point:
            layout[name] = TensorInfo(torch.float32, info.shape)

    def parts(tensor: str) -> dict[str, Tensor]:
        update = update_of(base, expert, tensor)
        progress(expert.tensors[tensor].num_bytes)
        if tensor in layout:
            return {tensor: update.to(torch.float32)}
        rank = layout[tensor + _SPECTRUM].shape[0]
        return _padded(tensor, _directions(update, expert.load(tensor), rank), layout)

    shared = _Shared(parts)

    def compute(name: str) -> Tensor:
        return shared.take(name.rpartition(":")[0] if name.endswith((_LEFT, _SPECTRUM, _RIGHT)) else name, name)

    with one_torch_thread():
        write_checkpoint(out, layout, compute, num_workers=os.cpu_count() or 1)


class _Shared:
    """The parts of each tensor, made once by whichever thread asks first, and forgotten when all are taken."""

    def __init__(self, make: Callable[[str], dict[str, Tensor]]) -> None:
        self._make = make
        self._lock = Lock()
        self._made: dict[str, Future[dict[str, Tensor]]] = {}

    def take(self, tensor: str, part: str) -> Tensor:
        with self._lock:
            future = self._made.get(tensor)
            if is_first := future is None:
                future = self._made[tensor] = Future()
        if is_first:
            try:
                future.set_result(self._make(tensor))
            except BaseException as error:
                future.set_exception(error)
        parts = future.result()
        with self._lock:
            taken = parts.pop(part)
            if not parts:
                del self._made[tensor]
        return taken


def _directions(update: Tensor, stored: Tensor, rank: int) -> Spectrum:
    """The leading directions above the rounding floor of the expert's dtype.

    The floor is that of a dense update. A small matrix, and an update of which it would leave nothing (a few weights
    moved by one unit in the last place), keeps what is there: no expert vanishes silently.
    """
    floor = rounding_floor(stored) if min(update.shape) > _FULL_BELOW else 0.0
    found = leading_triplets(update, rank, floor)
    return found if found.rank else leading_triplets(update, rank)


def stored_rank(max_rank: int, rank_fraction: float) -> int:
    """How many directions of a matrix are stored: the fraction, rounded up; all of a small matrix."""
    return max(ceil(rank_fraction * max_rank), min(max_rank, _FULL_BELOW))


def update_of(base: Checkpoint, expert: Checkpoint, name: str) -> Tensor:
    """``W_i - W_0`` of one tensor in float64.

    Raises:
        NumericalError: if it is not finite, naming the tensor and the checkpoint at fault.
    """
    update = expert.load(name).to(torch.float64) - base.load(name).to(torch.float64)
    if not torch.isfinite(update).all():
        for checkpoint in (base, expert):
            require_finite(name, checkpoint.load(name), checkpoint.name)
        raise NumericalError(f"{name!r}: the update of {expert.name} overflows float64.")
    return update


def require_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise a NumericalError that names the tensor, where it stands and how many entries are NaN or infinite."""
    if bad := int((~torch.isfinite(tensor.to(torch.float64))).sum()):
        raise NumericalError(
            f"{name!r}: {bad} of {tensor.numel()} entries are NaN or infinite in {where}. "
            "The checkpoint is broken, or was stored in a dtype too narrow for it; use another one."
        )


def measure_expert(base: Checkpoint, expert: Checkpoint, settings: StatisticsSettings, out: Path) -> None:
    """Write the statistics of every matrix update of one expert as ``statistics.json``."""
    expected = check_compatible(base, {expert.name: expert})
    with one_torch_thread():
        found = {
            name: asdict(measure(update_of(base, expert, name), settings))
            for name, info in sorted(expected.items())
            if is_matrix(info, None, "spectral")
        }
    (out / STATISTICS_FILE).write_text(json.dumps(found, indent=1, sort_keys=True))


def read_statistics(folder: Path) -> dict[str, Statistics]:
    """Tensor name to statistics, as :func:`measure_expert` wrote them."""
    stored = json.loads((folder / STATISTICS_FILE).read_text())
    return {name: Statistics(**values) for name, values in stored.items()}


class TaskVectors:
    """One expert's decomposed task vector, read one tensor at a time."""

    def __init__(self, folder: Path, expert: str) -> None:
        self.expert = expert
        self._file = Checkpoint(folder, f"task vectors of expert {expert!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def is_decomposed(self, name: str) -> bool:
        """Whether a tensor is stored by its singular triplets."""
        return name + _SPECTRUM in self._file.tensors

    def spectrum(self, name: str, rank: int) -> Spectrum:
        """The leading ``rank`` triplets of a matrix, in float32, or all that are above the rounding floor.

        Raises:
            CheckpointError: if more directions are wanted than are stored.
        """
        spectrum = self._file.load(name + _SPECTRUM)
        left, right_t = self._file.load(name + _LEFT), self._file.load(name + _RIGHT)
        full = min(left.shape[0], right_t.shape[1])
        if spectrum.numel() < rank <= full:
            raise CheckpointError(
                f"{self._file.name}: {name!r} stores {spectrum.numel()} of {full} directions, {rank} are wanted. "
                "Decompose the expert again with a larger rank_fraction."
            )
        kept = min(rank, int((spectrum > 0).sum()))
        return Spectrum(left, spectrum, right_t).truncated(kept)

    def update(self, name: str) -> Tensor:
        """The whole update of a tensor in float32; a decomposed one is recomposed, which needs all its directions.

        Raises:
            CheckpointError: if a decomposed tensor stores fewer directions than it has.
        """
        if not self.is_decomposed(name):
            return self._file.load(name)
        full = min(self._file.tensors[name + _LEFT].shape[0], self._file.tensors[name + _RIGHT].shape[1])
        stored = self.spectrum(name, full)
        return (stored.left * stored.spectrum) @ stored.right_t


def _padded(name: str, triplets: Spectrum, layout: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    rank = triplets.rank
    left, spectrum, right_t = (torch.zeros(layout[name + part].shape) for part in (_LEFT, _SPECTRUM, _RIGHT))
    left[:, :rank], spectrum[:rank], right_t[:rank] = triplets.left, triplets.spectrum, triplets.right_t
    return {name + _LEFT: left, name + _SPECTRUM: spectrum, name + _RIGHT: right_t}
