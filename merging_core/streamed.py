"""Weights that stay on object storage: a note beside the config stands for the file, and ranges of it are read.

How ranges are read is told by :func:`read_ranges_with`; nothing here knows a network.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from threading import get_ident
from typing import Any, Final, TypeAlias

from merging_core.errors import CheckpointError

_NOTE_SUFFIX: Final = ".streamed.json"
LENGTH_BYTES: Final = 8
"""Of the number at the beginning of a safetensors file: the length of its header."""
_MAX_HEADER_BYTES: Final = 100_000_000  # as the safetensors library allows

ReadRange: TypeAlias = Callable[[int, memoryview], None]
"""Fills the memory with the file's bytes from an offset on, or raises a CheckpointError. Called by several threads."""


@dataclass(frozen=True, slots=True)
class StreamedFile:
    """A safetensors file that is not here, pinned to content."""

    url: str
    """Without credentials."""
    size: int
    """In bytes."""
    version: str
    """As the storage told it when the sha256 was taken; other bytes have another version."""
    sha256: str
    header: str
    """Its safetensors header: names, dtypes, shapes and places of the tensors."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """Where a tensor is in a file."""

    dtype: str
    """Name of the safetensors format."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_entries(self) -> int:
        """Product of the shape."""
        return prod(self.shape)


def header_length(beginning: bytes, size: int, url: str) -> int:
    """Length in bytes of a file's header.

    Args:
        beginning: its first ``LENGTH_BYTES`` bytes.
        size: bytes of the file.
        url: how messages call it.

    Raises:
        CheckpointError: if that is more than the file or the format allows.
    """
    length = int.from_bytes(beginning, "little")
    if not 2 <= length <= min(size - LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise damaged(url, f"a header of {length:,} bytes in a file of {size:,}")
    return length


def tensors_of(file: StreamedFile) -> dict[str, StreamedTensor]:
    """Read a header: the tensors must fill the file, without holes and overlaps.

    Raises:
        CheckpointError: if it is damaged.
    """
    data = LENGTH_BYTES + len(file.header.encode())
    try:
        stored = json.loads(file.header)
        stored.pop("__metadata__", None)
        found = {name: _tensor(entry, data) for name, entry in stored.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(file.url, f"its header cannot be read: {error!r}") from error
    end = data
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if one.start != end or one.end < one.start:
            raise damaged(file.url, f"{name!r} is not where the tensor before it ends")
        end = one.end
    if end != file.size:
        raise damaged(file.url, f"the tensors end at byte {end:,}, the file has {file.size:,}")
    return found


def damaged(url: str, why: str) -> CheckpointError:
    """The error for a file that is not what its format says."""
    return CheckpointError(
        f"{url}: not a complete safetensors file ({why}). The copy is cut short or damaged; upload it again."
    )


def stored(path: Path) -> Path:
    """The file itself, or the note that stands for it if it is streamed."""
    note = note_of(path)
    return note if not path.exists() and note.exists() else path


def note_of(path: Path) -> Path:
    """Where the note of a weight file is."""
    return path.with_name(path.name + _NOTE_SUFFIX)


def is_note(path: Path) -> bool:
    """Whether a path names the note of a streamed file."""
    return path.name.endswith(_NOTE_SUFFIX)


def is_streamed(folder: Path) -> bool:
    """Whether a folder has notes for files that it lacks."""
    return any(not path.with_name(shard_name(path)).exists() for path in folder.glob(f"*{_NOTE_SUFFIX}"))


def shard_name(path: Path) -> str:
    """Name of a weight file, also where the path names the note of it."""
    return path.name.removesuffix(_NOTE_SUFFIX)


def require_files(folder: Path, name: str | None = None) -> None:
    """Refuse a streamed checkpoint where real files of weights are needed.

    Raises:
        CheckpointError: with the remedy.
    """
    if is_streamed(folder):
        url = read_note(next(folder.glob(f"*{_NOTE_SUFFIX}"))).url
        raise CheckpointError(
            f"{name or folder}: is streamed from {url.rpartition('/')[0]}, and files of weights are needed here. Free "
            "space or name a store on a larger disk, lift TRIPOISE_MAX_DOWNLOAD_GB if it is set, and run again with "
            "that source: then it is downloaded. Merging needs no files."
        )


def write_note(path: Path, file: StreamedFile) -> None:
    """Write the note of a file; it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(json.dumps(asdict(file)))
            out.flush()
            os.fsync(out.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_note(path: Path) -> StreamedFile:
    """Read what :func:`write_note` wrote.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return StreamedFile(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the note of a streamed file ({error}). Remove its folder and run again."
        ) from error


def read_ranges_with(opener: Callable[[StreamedFile], ReadRange]) -> None:
    """Tell how streamed files are read; ``tasks`` does, whatever of it is imported."""
    global _opener
    _opener = opener


def open_ranges(file: StreamedFile) -> ReadRange:
    """What reads ranges of a file.

    Raises:
        CheckpointError: if nothing was told that does.
    """
    if _opener is None:
        raise CheckpointError(f"{file.url}: is streamed, and merging_core reads no network. Import tasks first.")
    return _opener(file)


_opener: Callable[[StreamedFile], ReadRange] | None = None


def _tensor(entry: dict[str, Any], data: int) -> StreamedTensor:
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError("offsets and shapes must be whole numbers >= 0")
    return StreamedTensor(str(entry["dtype"]), shape, data + start, data + end)
