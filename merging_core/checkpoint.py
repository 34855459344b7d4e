"""Checkpoint folders on disk, read one tensor at a time; merging_core/writer.py writes them.

A valid checkpoint folder holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json``
with every shard that it names; each tensor of the index is in its shard and each tensor of a shard is in the index.
A weight file may be streamed from object storage: then a note stands for it (merging_core/streamed.py).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merging_core.errors import CheckpointError
from merging_core.streamed import (
    StreamedFile,
    StreamedTensor,
    is_note,
    open_ranges,
    read_note,
    shard_name,
    stored,
    tensors_of,
)

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
PICKLES: Final = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.ckpt")

# The type names of the safetensors format. Types narrower than a byte have no torch counterpart and are refused.
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data on disk."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Checkpoint:
    """A folder of safetensors weights; opening reads the headers, ``load`` one tensor.

    Args:
        folder: the checkpoint's folder.
        name: how messages call it, such as ``expert 'honest'``; default: the folder's path.
        files: its weight files; default: those that a checkpoint's folder names.

    Raises:
        CheckpointError: if the folder is missing, holds no safetensors weights (pickled weights are refused with the
            remedy), a file is cut short or damaged, or index and shards disagree.
    """

    def __init__(self, folder: Path | str, name: str | None = None, files: Sequence[Path] | None = None) -> None:
        self.folder = Path(folder)
        self.name = name or str(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.name}: no folder {self.folder}. Check the path.")
        self.config = read_json(self.folder / CONFIG) if (self.folder / CONFIG).exists() else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        self._shards: dict[str, str] = {}
        self._handles = ExitStack()
        self.is_streamed = False
        """Whether tensors are read from object storage: then each load holds its own copy."""
        try:
            for file in files or weight_files(self.folder, self.name):
                self._open(file)
            self._check_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._handles.close()

    def load(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, on the CPU."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def _open(self, file: Path) -> None:
        # safetensors would say that it is not there.
        if file.is_file() and not os.access(file, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise CheckpointError(f"{file}: cannot be read. Give this user the right to read it.")
        handle, infos = self._open_streamed(read_note(file)) if is_note(file) else self._map(file)
        for name, (kind, shape) in infos.items():
            if name in self._files:
                raise CheckpointError(f"{self.name}: tensor {name!r} is in two shards. Remove the stale shard.")
            if kind not in DTYPES:
                raise CheckpointError(
                    f"{shard_name(file)}: {name!r} has dtype {kind}, expected one of {', '.join(DTYPES)}. "
                    "Packed and quantized weights cannot be merged; use the unquantized checkpoint."
                )
            self._files[name] = handle
            self._shards[name] = shard_name(file)
            self.tensors[name] = TensorInfo(DTYPES[kind], shape)

    def _map(self, file: Path) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]:
        try:
            handle = self._handles.enter_context(safe_open(file, framework="pt"))
            slices = {name: handle.get_slice(name) for name in list(handle.keys())}
            return handle, {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: not a complete safetensors file ({error}). The copy is cut short or damaged; fetch it again."
            ) from error

    def _open_streamed(self, file: StreamedFile) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]:
        self.is_streamed = True
        places = tensors_of(file)
        return _Streamed(file, places), {name: (place.dtype, place.shape) for name, place in places.items()}

    def _check_index(self) -> None:
        path = self.folder / INDEX
        if not path.exists():
            return
        indexed = read_json(path)["weight_map"]
        if lost := sorted(name for name, shard in indexed.items() if self._shards.get(name) != shard):
            raise CheckpointError(
                f"{self.name}: {len(lost)} tensors are not in the shard that the index names, first {lost[:3]}. "
                "Index and shards are of different copies; fetch both again."
            )
        if stray := sorted(set(self.tensors) - set(indexed)):
            raise CheckpointError(
                f"{self.name}: {len(stray)} tensors are in shards but not in the index, first {stray[:3]}. "
                "Index and shards are of different copies; fetch both again."
            )


class _Streamed:
    """A file on object storage, of which a tensor is read whenever it is asked for."""

    def __init__(self, file: StreamedFile, places: Mapping[str, StreamedTensor]) -> None:
        self._places, self._read = places, open_ranges(file)
        for name, place in places.items():
            itemsize = DTYPES[place.dtype].itemsize if place.dtype in DTYPES else None
            if itemsize is not None and place.num_entries * itemsize != place.end - place.start:
                raise CheckpointError(
                    f"{file.url}: not a complete safetensors file ({name!r} has {place.end - place.start:,} bytes, "
                    f"{place.dtype} {list(place.shape)} needs {place.num_entries * itemsize:,}). Upload it again."
                )

    def get_tensor(self, name: str) -> Tensor:
        place = self._places[name]
        content = torch.empty(place.end - place.start, dtype=torch.uint8)
        if len(content):
            self._read(place.start, content.numpy().data)
        return content.view(DTYPES[place.dtype]).reshape(place.shape)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted by name; of a streamed one, its note.

    Raises:
        CheckpointError: if there are none, if a shard of the index is missing, or if single file and index are both
            there, since then one of them is stale.
    """
    single, index = stored(folder / SINGLE), folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{name}: holds both {SINGLE} and {INDEX}; one of them is stale. Remove that one.")
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map. Fetch the file again.")
        files = sorted({folder / str(file) for file in weight_map.values()})
        if stray := [file.name for file in files if file.parent != folder]:
            raise CheckpointError(f"{index}: shard {stray[0]!r} lies outside the folder. Fetch the file again.")
        files = [stored(file) for file in files]
        if lost := [file.name for file in files if not file.exists()]:
            raise CheckpointError(
                f"{name}: {len(lost)} of {len(files)} shards are missing, first {lost[0]!r}. Fetch them."
            )
        return files
    if single.exists():
        return [single]
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{name}: {folder} is a PEFT adapter, and a complete model is expected here. An adapter can be an expert "
            "of a recipe; a recipe with that one expert makes a complete model of it."
        )
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{name}: {folder} holds pickled weights ({pickles[0]}), which can run code when loaded and are refused. "
            f"Convert them first: tripoise convert {folder} --out NEW_FOLDER."
        )
    raise CheckpointError(f"{name}: {folder} holds no {SINGLE} or {INDEX}. Name a folder with safetensors weights.")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    # Not isdigit(): int() refuses digits such as superscripts, which \d does not match either.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}. Fetch the file again.")
    return value
