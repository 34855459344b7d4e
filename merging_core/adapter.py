"""PEFT LoRA adapters as experts: the base's tensors with low-rank updates, made dense one tensor at a time.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Neither peft nor transformers is
imported: what is read has the meaning that PEFT 0.21.2 gives it, and what has more meaning than ``W_0 + scaling * B A``
or a replaced tensor is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from merging_core.adapter_config import ADAPTER_CONFIG, REMEDY, AdapterConfig
from merging_core.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo
from merging_core.compatibility import EMBEDDINGS, HEAD, own_tensors
from merging_core.errors import CheckpointError, IncompatibleError
from merging_core.streamed import stored

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PICKLED_ADAPTER: Final = "adapter_model.bin"
PREFIX: Final = "base_model.model."

_PART: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_B\.bias)")
_SHOWN: Final = 3


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no complete model."""
    return (folder / ADAPTER_CONFIG).exists() and not any(stored(folder / name).exists() for name in (SINGLE, INDEX))


def adapter_weights(folder: Path, name: str) -> Path:
    """The weight file of an adapter folder.

    Raises:
        CheckpointError: if it is missing; pickled weights are refused.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        return folder / ADAPTER_WEIGHTS
    if (folder / PICKLED_ADAPTER).exists():
        raise CheckpointError(
            f"{name}: {folder} holds a pickled adapter ({PICKLED_ADAPTER}), which can run code when loaded and is "
            "refused. Load it with peft where you trust it, and save it again: save_pretrained writes safetensors."
        )
    raise CheckpointError(f"{name}: {folder} holds no {ADAPTER_WEIGHTS}. Copy it from where the adapter came from.")


def open_expert(folder: Path, base: Checkpoint, name: str) -> Checkpoint:
    """Open what an expert's folder holds: a complete checkpoint, or an adapter on ``base``.

    Raises:
        CheckpointError, IncompatibleError: see :class:`Checkpoint` and :class:`Adapter`.
    """
    return Adapter(folder, base, name) if is_adapter(folder) else Checkpoint(folder, name)


@dataclass(frozen=True, slots=True)
class _LowRank:
    """Where the factors of one matrix are."""

    first: str
    """Name of the R x in tensor: ``lora_A`` or ``lora_embedding_A``."""
    second: str
    """Name of the out x R tensor: ``lora_B`` or ``lora_embedding_B``."""
    shape: tuple[int, int]
    """Of the update, as the base stores the matrix."""
    is_transposed: bool
    """Whether that is in x out: an embedding, or a ``Conv1D``."""
    rank: int
    scaling: float


class Adapter(Checkpoint):
    """A LoRA adapter seen as a checkpoint: names of its base, and ``load`` gives ``W_0 + scaling * B A``.

    Args:
        folder: the adapter's folder.
        base: the checkpoint that it is added to; must stay open as long as the adapter.
        name: how messages call it, such as ``expert 'honest'``.

    Raises:
        CheckpointError: if a file is missing, damaged or pickled, config and weights disagree, or the adapter is more
            than low-rank updates and replaced tensors (DoRA and others); the reason is named.
        IncompatibleError: listing all that does not fit the base.

    References:
        Hu et al., LoRA (arXiv 2106.09685); Kalajdzievski, rsLoRA (arXiv 2312.03732); PEFT 0.21.2.
        Deviation: where the base ties head and embedding, the adapter must have trained them as one, and its update is
        added once (PEFT's merge adds the updates of both to the shared matrix).
    """

    def __init__(self, folder: Path | str, base: Checkpoint, name: str) -> None:
        self._settings = AdapterConfig(Path(folder), name)
        super().__init__(folder, name, [adapter_weights(Path(folder), name)])
        try:
            self._base, self.config = base, base.config
            self._stored, self.tensors = self.tensors, own_tensors(base)
            self._low_rank: dict[str, _LowRank] = {}
            self._replaced: dict[str, str] = {}
            self._shifts: dict[str, tuple[str, float]] = {}
            self._assign()
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> Tensor:
        """One tensor of the adapted model, dense.

        Returns:
            A tensor with an update in float32, or in float64 if the base stores float64; a replaced tensor as the
            adapter stores it; any other as the base stores it.
        """
        tensor = self._read(self._replaced[name]) if name in self._replaced else self._base.load(name)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if name in self._low_rank:
            left, right = self._factors(self._low_rank[name])
            return torch.addmm(tensor.to(wide), left.to(wide), right.to(wide))
        if name in self._shifts:
            key, scaling = self._shifts[name]
            return tensor.to(wide).add(self._read(key).to(wide), alpha=scaling)
        return tensor

    def rank(self, name: str) -> int | None:
        """Columns of the factors of a matrix, 0 where the adapter leaves it as it is; None for any other tensor."""
        if name in self._low_rank:
            return self._low_rank[name].rank
        info = self.tensors[name]
        return 0 if len(info.shape) == 2 and info.dtype.is_floating_point and name not in self._replaced else None

    def factors(self, name: str) -> tuple[Float[Tensor, "M R"], Float[Tensor, "R N"]]:
        """Factors of the update of a matrix that has a rank, in float64; the scaling is in the left one."""
        if name in self._low_rank:
            return self._factors(self._low_rank[name])
        rows, cols = self.tensors[name].shape
        return torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, cols, dtype=torch.float64)

    def _factors(self, low: _LowRank) -> tuple[Tensor, Tensor]:
        first, second = self._read(low.first).to(torch.float64), self._read(low.second).to(torch.float64)
        left, right = (first.T, second.T) if low.is_transposed else (second, first)
        return left * low.scaling, right

    def _read(self, key: str) -> Tensor:
        return super().load(key)

    def _assign(self) -> None:
        """Find the tensor of the base that each tensor of the file changes; none may be left over."""
        layers: dict[str, dict[str, str]] = {}
        for key in self._stored:
            path = key.removeprefix(PREFIX)
            if match := _PART.fullmatch(path):
                _put(key, match["part"], layers.setdefault(match["module"], {}), self.name)
            elif ".lora_" in path or ".token_adapter." in path:
                raise CheckpointError(f"{self.name}: the meaning of its tensor {key!r} is not known. {REMEDY}")
            else:
                _put(key, path.replace(".base_layer.", "."), self._replaced, self.name)
        if not self._stored:
            raise CheckpointError(f"{self.name}: {ADAPTER_WEIGHTS} holds no tensors. Fetch the file again.")
        embedding = next((name for name in self.tensors if name.endswith(EMBEDDINGS)), None)
        tied = embedding if self.config.get("tie_word_embeddings") else None
        expected = self.tensors | ({HEAD: self.tensors[tied]} if tied else {})
        for module, parts in layers.items():
            self._assign_layer(module, parts, expected.get(f"{module}.weight"))
        self._check_shapes(expected)
        self._check_orientation()
        if tied:
            self._check_tied(tied)
        self._check_copies()
        self.tensors |= {name: self._stored[key] for name, key in self._replaced.items()}

    def _assign_layer(self, module: str, parts: Mapping[str, str], wanted: TensorInfo | None) -> None:
        is_embedding = any("embedding" in part for part in parts)
        names = [f"lora_embedding_{side}" if is_embedding else f"lora_{side}.weight" for side in "AB"]
        if lost := [name for name in names if name not in parts]:
            raise CheckpointError(f"{self.name}: layer {module!r} has no {lost[0]}. Fetch {ADAPTER_WEIGHTS} again.")
        if odd := sorted(parts.keys() - {*names, "lora_B.bias"}):
            raise CheckpointError(f"{self.name}: layer {module!r} has both {names[0]} and {odd[0]}. {REMEDY}")
        first, second = (parts[name] for name in names)
        shapes = self._stored[first].shape, self._stored[second].shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            raise CheckpointError(f"{self.name}: layer {module!r} is a convolution. {REMEDY}")
        (rank, num_in), (num_out, columns) = shapes
        stated, scaling = self._settings.rank_and_scaling(module)
        if not rank == columns == stated:
            raise CheckpointError(
                f"{self.name}: layer {module!r} has factors {list(shapes[0])} and {list(shapes[1])}, {ADAPTER_CONFIG} "
                f"says rank {stated}; PEFT would refuse it as well. Fetch both files again, and let no two entries of "
                "rank_pattern match one layer: PEFT loses their order."
            )
        # PEFT looks at the class of a layer and leaves in its config the flag of the last one; shapes are certain.
        is_transposed = is_embedding or self._settings.is_transposed
        if not is_embedding and num_in != num_out and wanted:
            is_transposed = wanted.shape == (num_in, num_out)
        shape = (num_in, num_out) if is_transposed else (num_out, num_in)
        self._low_rank[f"{module}.weight"] = _LowRank(first, second, shape, is_transposed, rank, scaling)
        if "lora_B.bias" in parts:
            self._shifts[f"{module}.bias"] = parts["lora_B.bias"], scaling

    def _check_shapes(self, expected: Mapping[str, TensorInfo]) -> None:
        found = {name: self._stored[key].shape for name, key in self._replaced.items()}
        found |= {name: self._stored[key].shape for name, (key, _) in self._shifts.items()}
        found |= {name: low.shape for name, low in self._low_rank.items()}
        lost = sorted(found.keys() - expected.keys())
        reshaped = [
            f"{name} {list(shape)} instead of {list(expected[name].shape)}"
            for name, shape in sorted(found.items())
            if name in expected and shape != expected[name].shape
        ]
        problems = [
            f"{len(items)} {what}, first {', '.join(items[:_SHOWN])}"
            for items, what in ((lost, "tensors that the base lacks"), (reshaped, "tensors of another shape"))
            if items
        ]
        if problems:
            raise IncompatibleError(
                f"{self.name}: its adapter changes {'; '.join(problems)}. It was trained on "
                f"{self._settings.trained_on}; name that model as the base, with tensors named as its class names them."
            )

    def _check_orientation(self) -> None:
        """How a square layer is stored follows from the flag alone, which other layers must not contradict."""
        layers = {name: low for name, low in self._low_rank.items() if "embedding" not in low.first}
        unclear = sorted(name for name, low in layers.items() if low.shape[0] == low.shape[1])
        flag = self._settings.is_transposed
        contrary = sorted(
            name for name, low in layers.items() if low.shape[0] != low.shape[1] and low.is_transposed != flag
        )
        if unclear and contrary:
            raise CheckpointError(
                f"{self.name}: {ADAPTER_CONFIG} sets fan_in_fan_out to {flag}, and {contrary[0]!r} is stored the other "
                f"way; which way the square {unclear[0]!r} is stored cannot be told. {REMEDY}"
            )

    def _check_tied(self, embedding: str) -> None:
        """Where the base ties the head to the embedding, the adapter must change both alike; the head is left out."""
        touched = [name for name in (embedding, HEAD) if name in self._low_rank or name in self._replaced]
        if touched and not self._are_alike(embedding, HEAD):
            raise IncompatibleError(
                f"{self.name}: its adapter changes {' and '.join(touched)} on its own, and {self._base.name} ties "
                f"{embedding} and {HEAD}. Untie the base: store both in it and set tie_word_embeddings to false."
            )
        self._low_rank.pop(HEAD, None)
        self._replaced.pop(HEAD, None)

    def _are_alike(self, one: str, other: str) -> bool:
        if one in self._low_rank and other in self._low_rank:
            factors = (self._factors(self._low_rank[name]) for name in (one, other))
            return all(torch.equal(own, others) for own, others in zip(*factors, strict=True))
        if one in self._replaced and other in self._replaced:
            return torch.equal(self._read(self._replaced[one]), self._read(self._replaced[other]))
        return False

    def _check_copies(self) -> None:
        """PEFT stores a copy of the base's embedding beside its factors, which must be just that."""
        for name in sorted(self._low_rank.keys() & self._replaced.keys()):
            copy, own = self._read(self._replaced.pop(name)), self._base.load(name)
            if not torch.equal(copy.to(own.dtype), own) and not torch.equal(copy, own.to(copy.dtype)):
                raise IncompatibleError(
                    f"{self.name}: its adapter was trained on another {name!r} than that of {self._base.name}. "
                    f"Its base was {self._settings.trained_on}; name that one."
                )


def _put(key: str, place: str, taken: dict[str, str], name: str) -> None:
    if place in taken:
        raise CheckpointError(
            f"{name}: its tensors {taken[place]!r} and {key!r} mean the same. Save the adapter again with peft."
        )
    taken[place] = key
