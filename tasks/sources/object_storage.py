"""Checkpoints on object storage: the files that make one, downloaded into the store and pinned to content.

Weights that do not fit the disk are streamed: they are read once for their sha256, a note stands for each file, and
whoever wants a tensor reads it from the storage.
"""

import hashlib
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from merging_core.adapter_config import ADAPTER_CONFIG
from merging_core.checkpoint import INDEX
from merging_core.digest import digest_of
from merging_core.errors import CheckpointError, RecipeError
from merging_core.streamed import (
    LENGTH_BYTES,
    StreamedFile,
    damaged,
    header_length,
    note_of,
    read_note,
    tensors_of,
    write_note,
)
from tasks.progress import Progress, silent
from tasks.remote import Object, Storage, reserve
from tasks.sources.local import ADAPTER, COMPANIONS, SAFETENSORS, weight_names
from tasks.store import Store, free_bytes, full_disk_told, remove, require_free

DOWNLOADS: Final = "downloads"
LIMIT: Final = "TRIPOISE_MAX_DOWNLOAD_GB"
"""Names the environment variable with the size from which weights are streamed; without it, the free disk decides."""
_NOTES: Final = Path("hashes") / "streamed"
_BLOCK: Final = 512  # bytes, the unit of st_blocks
_SMALL: Final = (*COMPANIONS, ADAPTER_CONFIG, INDEX, "README.md")

log = logging.getLogger("tripoise.sources")


def fetch(source: str, store: Store, progress: Progress) -> Path:
    """Download what a checkpoint or an adapter needs; gives its folder in the store.

    The weights of a checkpoint that are larger than what running downloads leave of the free disk, or than
    ``TRIPOISE_MAX_DOWNLOAD_GB``, are streamed: of each file the folder gets a note, and what arrived of a download is
    removed. Adapters are small and always downloaded.

    The prefix is listed every time. Files whose size and version (ETag) did not change are not downloaded again, and a
    broken download goes on where it stopped.

    Args:
        source: ``s3://bucket/prefix``, or a folder on any storage that fsspec knows.
        store: where the files go, in a folder of its own for every content of the prefix.
        progress: called with bytes done and bytes in all.

    Raises:
        RecipeError: if the URL holds credentials, or the limit in the environment is no number >= 0.
        CheckpointError: if the prefix holds no checkpoint, the disk is or becomes full, or the storage fails.
    """
    storage = Storage(source)
    listed = storage.list()
    if not listed:
        raise CheckpointError(f"{source}: no files. Check bucket and prefix, and the credentials in use.")
    versions = "".join(f"{name} {one.size} {one.version}\n" for name, one in sorted(listed.items()))
    place = hashlib.sha256(f"{storage.url}\n{versions}".encode()).hexdigest()
    folder = store.root / DOWNLOADS / place
    with store.lock(f"download-{place}"), full_disk_told(source, store.root, "what was downloaded is kept"):
        _download(storage, [name for name in _SMALL if name in listed], folder, silent)
        is_model = any(name in listed for name in SAFETENSORS)
        is_adapter = not is_model and ADAPTER_CONFIG in listed
        large = weight_names(folder, ADAPTER if is_adapter else SAFETENSORS)
        if lost := [name for name in large if name not in listed]:
            raise CheckpointError(
                f"{source}: lacks {len(lost)} of {len(large)} weight files, first {lost[0]!r}. Upload them too; "
                "weights must be safetensors."
            )
        missing = [name for name in large if not (folder / name).exists()]
        why = _claim({name: listed[name].size for name in missing}, folder, source, store, is_adapter)
        if why:
            log.warning(
                "%s is streamed: %s. Its weights are read once for their sha256, then again, tensor by tensor, by "
                "every step; what runs the model needs a download.",
                source,
                why,
            )
            _note_all(storage, {name: listed[name] for name in missing}, folder, store, progress)
        else:
            _download(storage, large, folder, progress)
    return folder


def _claim(sizes: dict[str, int], folder: Path, source: str, store: Store, is_adapter: bool) -> str:
    """Take the space for a download, so that no other counts with it; else why weights are streamed."""
    partial, size = _partial(folder), sum(sizes.values())
    if not sizes:
        return ""
    with store.lock("downloads"):
        needed, claimed = size - _allocated(partial), _claimed(store, partial)
        if is_adapter:
            require_free(folder, needed + claimed, f"{source}: the download")
        elif why := _why_streamed(size, needed, free_bytes(folder) - claimed, folder):
            remove(partial)
            return why
        for name, length in sizes.items():
            reserve(partial / name, length)
    return ""


def _claimed(store: Store, own: Path) -> int:
    """Bytes that running downloads of other sources have yet to write."""
    claimed = 0
    for folder in (store.root / DOWNLOADS).glob(".*.partial"):
        if folder != own and store.is_locked(f"download-{folder.name[1:].removesuffix('.partial')}"):
            with suppress(FileNotFoundError):  # it has just ended
                for stat in (path.stat() for path in folder.glob("*")):
                    claimed += max(stat.st_size - stat.st_blocks * _BLOCK, 0)
    return claimed


def _why_streamed(size: int, needed: int, free: int, folder: Path) -> str:
    """Why weights of ``size`` bytes, of which ``needed`` have not arrived, are not downloaded; "" if they are."""
    if size > (limit := _limit_bytes()):
        return f"{size:,} bytes are more than {LIMIT} allows ({limit:,.0f})"
    if needed > free:
        return (
            f"{needed:,} bytes are to be downloaded, {max(free, 0):,} are free on the disk of {folder} beside running "
            "downloads"
        )
    return ""


def _limit_bytes() -> float:
    text = os.environ.get(LIMIT) or "inf"
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise RecipeError(f"{LIMIT}: must be a number of gigabytes >= 0, got {text!r}. Leave it out for no limit.")
    return limit * 1e9


def _note_all(storage: Storage, files: dict[str, Object], folder: Path, store: Store, progress: Progress) -> None:
    total, done = sum(one.size for one in files.values()), 0
    for name, one in files.items():

        def advance(num_bytes: int, _: int, before: int = done) -> None:
            progress(before + num_bytes, total)

        if not (note := note_of(folder / name)).exists():
            write_note(note, _pinned(storage, one, store.root / _NOTES, advance))
        done += one.size


def _pinned(storage: Storage, one: Object, memo: Path, progress: Progress) -> StreamedFile:
    """Read a file's header and take its sha256; what is known of it is read from the memo."""
    if not one.version:
        raise CheckpointError(
            f"{one.url}: its storage tells no version of a file, so a change could not be noticed, and it cannot be "
            "streamed. Free some space, and let it be downloaded."
        )
    path = memo / f"{digest_of([one.url, one.size, one.version])}.json"
    # A memo that is missing or cannot be read only costs time.
    with suppress(CheckpointError):
        return read_note(path)
    length = header_length(_read(storage, one, 0, min(LENGTH_BYTES, one.size)), one.size, one.url)
    try:
        header = _read(storage, one, LENGTH_BYTES, length).decode()
    except UnicodeDecodeError as error:
        raise damaged(one.url, "its header is no text") from error
    # Before all of it is read.
    tensors_of(StreamedFile(one.url, one.size, one.version, "", header))
    file = StreamedFile(one.url, one.size, one.version, storage.sha256(one, progress), header)
    memo.mkdir(parents=True, exist_ok=True)
    write_note(path, file)
    return file


def _read(storage: Storage, one: Object, start: int, num_bytes: int) -> bytes:
    content = bytearray(num_bytes)
    storage.fill(one, start, memoryview(content))
    return bytes(content)


def _allocated(folder: Path) -> int:
    """Bytes on disk of what an interrupted download left."""
    return sum(path.stat().st_blocks * _BLOCK for path in folder.glob("*"))


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _download(storage: Storage, names: list[str], folder: Path, progress: Progress) -> None:
    """Fetch into a folder beside, and move over: what has its name is complete."""
    partial = _partial(folder)
    if missing := [name for name in names if not (folder / name).exists()]:
        storage.download({name: name for name in missing}, partial, progress)
        folder.mkdir(parents=True, exist_ok=True)
        for name in missing:
            (partial / name).rename(folder / name)
