"""Writing a checkpoint: one tensor at a time, shard by shard, so that a killed call can go on with the next shard."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from merging_core.checkpoint import DTYPES, INDEX, SINGLE, TensorInfo, natural_order
from merging_core.errors import CheckpointError
from merging_core.threads import computed_ahead

MAX_SHARD_BYTES: Final = 5_000_000_000
# The size of a safetensors header is padded to this many bytes, and wider dtypes come first: every tensor is aligned.
_ALIGNMENT: Final = 8
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    compute: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int = 1,
    held: Callable[[str], int] = lambda name: 0,
    max_held: float = math.inf,
    written: Callable[[int], None] = lambda num_bytes: None,
    keep: Callable[[str], bool] = lambda file: False,
    finished: Callable[[str, Sequence[str]], None] = lambda file, names: None,
    only: str | None = None,
) -> None:
    """Write a checkpoint's weights, asking for one tensor at a time.

    The header of a shard follows from names, dtypes and shapes alone, so each tensor goes to disk as soon as it is
    computed and no shard is held in memory. The layout depends on ``tensors`` only, never on their order.

    A shard gets its name when all of it is on disk. A call that was killed can therefore be made again with ``keep``:
    it goes on with the first shard that is not complete. Other weights in the folder are removed first.

    Args:
        folder: existing folder for the files.
        tensors: dtype and shape of every tensor to be written.
        compute: called once for each name; must return a tensor of the announced dtype and shape.
        max_shard_bytes: a shard is closed before it exceeds this; a larger tensor gets a shard of its own.
        num_workers: threads that compute; the files are written in order, whatever their number.
        held: bytes that computing a tensor holds, itself included.
        max_held: how many bytes may be held at a time; see :func:`merging_core.threads.computed_ahead`.
        written: called with the number of bytes after each tensor, also for those that are kept.
        keep: asked for each file that is there with the wanted header and size; whether its tensors are those wanted.
        finished: called with a file and the names in it, after they are on disk and before the file gets its name.
        only: the one file to write, of :func:`shards`; default: all, and the index where there are several.

    Raises:
        CheckpointError: if ``compute`` returns another dtype or shape than announced.
    """
    files = shards(tensors, max_shard_bytes)
    wanted = {only: files[only]} if only else files
    headers = {file: _header({name: tensors[name] for name in names}) for file, names in wanted.items()}
    sizes = {file: sum(tensors[name].num_bytes for name in names) for file, names in wanted.items()}
    kept = [file for file in wanted if _is_complete(folder / file, headers[file], sizes[file]) and keep(file)]
    _remove_weights(folder, kept)
    for file in kept:
        written(sizes[file])
    missing = {file: names for file, names in wanted.items() if file not in kept}
    computed = computed_ahead(list(chain(*missing.values())), compute, num_workers, held, max_held)
    with closing(computed):
        for file, names in missing.items():
            with _appearing(folder / file) as out:
                out.write(headers[file])
                for name, tensor in islice(computed, len(names)):
                    _write_tensor(out, name, tensor, tensors[name])
                    # The next one may need its memory.
                    del tensor
                    written(tensors[name].num_bytes)
                out.flush()
                os.fsync(out.fileno())
                finished(file, names)
    if len(wanted) > 1:
        weight_map = {name: file for file, names in wanted.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        with _appearing(folder / INDEX) as out:
            out.write((json.dumps(index, indent=2) + "\n").encode())


def shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    """File names to the names of the tensors in them, in the order in which they are written."""
    found: list[list[str]] = [[]]
    size = 0
    # Names that differ only in leading zeros are equal in natural order; the name itself decides.
    for name in sorted(tensors, key=lambda name: (natural_order(name), name)):
        num_bytes = tensors[name].num_bytes
        if found[-1] and size + num_bytes > max_shard_bytes:
            found.append([])
            size = 0
        found[-1].append(name)
        size += num_bytes
    number = len(found)
    return {
        SINGLE if number == 1 else f"model-{at:05d}-of-{number:05d}.safetensors": sorted(
            names, key=lambda name: (-tensors[name].dtype.itemsize, name)
        )
        for at, names in enumerate(found, start=1)
    }


def _is_complete(path: Path, header: bytes, data_size: int) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + data_size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _remove_weights(folder: Path, kept: Sequence[str]) -> None:
    """Remove what an earlier call left, of any layout, except the files to be kept."""
    for pattern in (SINGLE, INDEX, "model-*-of-*.safetensors", ".model*.partial"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink()


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as out:
        yield out
    partial.rename(path)


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.num_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(out: BinaryIO, name: str, tensor: Tensor, info: TensorInfo) -> None:
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        raise CheckpointError(
            f"{name!r}: announced as {info.dtype} {info.shape}, computed as {tensor.dtype} {tuple(tensor.shape)}."
        )
    if tensor.numel():
        out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
