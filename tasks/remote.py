"""Files on object storage (``s3://`` or any URL that fsspec knows): resumable transfers in parallel parts.

Credentials and endpoint come from the storage's own usual chain (for S3 ``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL`` and so on), never from a URL or a setting of ours.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from merging_core.errors import CheckpointError, RecipeError, StorageError
from merging_core.streamed import ReadRange, StreamedFile
from tasks.progress import Progress

PART_BYTES: Final = 32 << 20
"""Bytes of one request, each way."""
_THREADS: Final = 8
_READS: Final = BoundedSemaphore(_THREADS)
"""Ranges of streamed files that are read at a time, by all threads together."""
_WAITS_S: Final = (0.5, 1.0, 2.0, 4.0)
_FINAL: Final = (FileNotFoundError, PermissionError, IsADirectoryError)
_JOURNAL: Final = ".done"
_Result = TypeVar("_Result")

log = logging.getLogger("tripoise.remote")


@dataclass(frozen=True, slots=True)
class Object:
    """One file on object storage."""

    url: str
    size: int
    version: str
    """Changes with the content, as far as the storage tells: an ETag, a checksum, a time."""
    modified: float | None = field(default=None, compare=False)
    """When it was written, in seconds since 1970 by the storage's clock; None where the storage does not tell."""


class Storage:
    """The storage of one URL."""

    def __init__(self, url: str) -> None:
        """Find what serves ``url``; asks nothing of it yet.

        Raises:
            RecipeError: if the URL holds a user or a password, or nothing installed serves its scheme.
        """
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise RecipeError(
                f"{parts.scheme}://…{parts.path}: holds credentials. Leave them out; they come from the environment."
            )
        self.url = url.rstrip("/")
        self._fs = _filesystem(parts.scheme, self.url)

    def list(self) -> dict[str, Object]:
        """Every file directly below the URL, by name.

        Raises:
            CheckpointError: if the storage refuses or cannot be reached.
        """
        found = self._ask(lambda: self._fs.ls(self._path(), detail=True, refresh=True), missing=[])
        return {
            name: Object(f"{self.url}/{name}", int(one["size"]), _version(one), _modified(one))
            for one in found
            if one["type"] == "file" and (name := one["name"].rpartition("/")[2])
        }

    def folders(self) -> tuple[str, ...]:
        """Names of what lies directly below the URL and has files below it, sorted.

        Raises:
            CheckpointError: if the storage refuses or cannot be reached.
        """
        found = self._ask(lambda: self._fs.ls(self._path(), detail=True, refresh=True), missing=[])
        names = [one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory"]
        return tuple(sorted(names))

    def size(self, name: str) -> int | None:
        """Bytes of a file below the URL; None if there is none."""
        info = self._ask(lambda: self._fs.info(self._path(name), refresh=True), missing=None)
        return None if info is None else int(info["size"])

    def read(self, name: str) -> bytes | None:
        """A small file below the URL; None if there is none."""
        return self._ask(lambda: bytes(self._fs.cat_file(self._path(name))), missing=None)

    def head(self, name: str, num_bytes: int) -> bytes | None:
        """The first bytes of a file below the URL; None if there is none."""
        return self._ask(lambda: bytes(self._fs.cat_file(self._path(name), start=0, end=num_bytes)), missing=None)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; it appears whole or not at all."""
        self._ask(lambda: self._fs.pipe_file(self._path(name), content))

    def remove(self, names: Sequence[str]) -> None:
        """Remove files below the URL, those that are there."""
        for name in names:
            self._ask(lambda name=name: self._fs.rm_file(self._path(name)), missing=None)  # type: ignore[misc]

    def upload(self, files: Mapping[str, Path], progress: Progress) -> None:
        """Write files under the given names; one that is there with its size is not sent again.

        Names must be chosen by content, so that equal names and sizes mean equal bytes. Big files go in parts, each
        tried again by itself; a file appears when all of its parts arrived.

        Raises:
            CheckpointError: if the storage refuses or keeps failing. What was complete stays.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with _counted(f"upload to {self.url}", sum(sizes.values()), progress) as advance, _pool() as pool:

            def send(name: str) -> None:
                if self.size(name) != sizes[name]:
                    path, target = str(files[name]), self._path(name)
                    self._ask(lambda: self._fs.put_file(path, target, chunksize=PART_BYTES))
                advance(sizes[name])

            _all(pool, send, list(files))

    def download(self, names: Mapping[str, str], folder: Path, progress: Progress) -> None:
        """Fetch files into a folder, in parallel ranges; a broken download goes on where it stopped.

        Args:
            names: name below the URL to name in the folder.
            folder: made if missing. Parts that arrived are noted in it until all is there.
            progress: called with bytes done and bytes in all.

        Raises:
            CheckpointError: if a file is missing, changes meanwhile, or the storage keeps failing. What arrived stays.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = {name: self._info(name) for name in names}
        ranges = [
            (name, start, min(start + PART_BYTES, info.size))
            for name, info in before.items()
            for start in range(0, max(info.size, 1), PART_BYTES)
        ]
        journal = _Journal(folder / _JOURNAL)
        for name, local in names.items():
            reserve(folder / local, before[name].size)
        total = sum(info.size for info in before.values())
        with _counted(f"download of {self.url}", total, progress) as advance, _pool() as pool:

            def fetch(part: tuple[str, int, int]) -> None:
                name, start, end = part
                key = f"{names[name]} {before[name].version} {start} {end}"
                if key not in journal.done and end > start:
                    self._fetch(name, start, end, folder / names[name])
                    journal.add(key)
                advance(end - start)

            _all(pool, fetch, ranges)
        if changed := [name for name in names if self._info(name) != before[name]]:
            journal.forget()
            raise CheckpointError(f"{self.url}: {changed[0]} changed while it was downloaded. Run again.")
        journal.forget()

    def fill(self, pinned: Object, start: int, into: memoryview) -> None:
        """Read a range of a file below the URL into memory, in parallel parts.

        Args:
            pinned: the file as it was listed.
            start: offset of the range in bytes; ``into`` says how long it is.
            into: is filled; in all threads together, eight parts are held beside it, each twice while the HTTP client
                joins it.

        Raises:
            CheckpointError: if the file changed since it was listed; a StorageError if the storage keeps failing.
        """
        name = pinned.url.rpartition("/")[2]

        def part(offset: int) -> None:
            end = min(offset + PART_BYTES, len(into))
            with _READS:
                into[offset:end] = self._range(name, start + offset, start + end)

        offsets = range(0, len(into), PART_BYTES)
        with self._unchanged(pinned):
            if len(offsets) == 1:
                part(0)
            else:
                with _pool() as pool:
                    _all(pool, part, offsets)

    def sha256(self, pinned: Object, progress: Progress) -> str:
        """Read a file below the URL once, in parallel parts of bounded memory.

        Args:
            pinned: the file as it was listed.
            progress: called with bytes done and bytes in all.

        Raises:
            CheckpointError: as :meth:`fill` does.
        """
        from merging_core.threads import computed_ahead  # brings torch

        name, state = pinned.url.rpartition("/")[2], hashlib.sha256()
        parts = [str(start) for start in range(0, pinned.size, PART_BYTES)]

        def read(start: str) -> bytes:
            with _READS:
                return self._range(name, int(start), min(int(start) + PART_BYTES, pinned.size))

        with (
            self._unchanged(pinned),
            _counted(f"sha256 of {pinned.url}", pinned.size, progress) as advance,
            closing(computed_ahead(parts, read, _THREADS)) as contents,
        ):
            for _, content in contents:
                state.update(content)
                advance(len(content))
        return state.hexdigest()

    @contextmanager
    def _unchanged(self, pinned: Object) -> Iterator[None]:
        """Look at a file after it was read: what it is now it was then. s3fs sends no ``If-Match``."""
        name = pinned.url.rpartition("/")[2]
        try:
            yield
        except CheckpointError:
            # A change explains a failure best.
            self._require_same(name, pinned)
            raise
        self._require_same(name, pinned)

    def _require_same(self, name: str, pinned: Object) -> None:
        if self._info(name) != pinned:
            raise CheckpointError(f"{pinned.url}: changed since it was pinned to content. Run again from the source.")

    def _range(self, name: str, start: int, end: int) -> bytes:
        def once() -> bytes:
            content = bytes(self._fs.cat_file(self._path(name), start=start, end=end))
            if len(content) != end - start:
                raise OSError(f"{len(content)} bytes arrived instead of {end - start}")
            return content

        return self._ask(once)

    def _fetch(self, name: str, start: int, end: int, path: Path) -> None:
        content = self._range(name, start, end)
        handle = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(handle, content, start)
        finally:
            os.close(handle)

    def _info(self, name: str) -> Object:
        info = self._ask(lambda: self._fs.info(self._path(name), refresh=True), missing=None)
        if info is None:
            raise CheckpointError(f"{self.url}: holds no {name}. Check the address, and that its upload was finished.")
        return Object(f"{self.url}/{name}", int(info["size"]), _version(info))

    def _path(self, name: str = "") -> str:
        return str(self._fs._strip_protocol(f"{self.url}/{name}" if name else self.url))

    def _ask(self, call: Callable[[], _Result], **missing: Any) -> _Result:
        """Call the storage, again after a while if it fails; ``missing`` is the answer where there is nothing."""
        for wait in (*_WAITS_S, None):
            try:
                return call()
            except _FINAL as error:
                if "missing" in missing and isinstance(error, FileNotFoundError):
                    return missing["missing"]  # type: ignore[no-any-return]
                raise CheckpointError(
                    f"{self.url}: {_kind(error)}. Check the address and the permissions of the credentials in use."
                ) from error
            except Exception as error:  # each storage has failures of its own
                if wait is None or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                    raise StorageError(
                        f"{self.url}: the storage failed ({_kind(error)}). Check endpoint and credentials, and run "
                        "again; what was transferred is kept."
                    ) from error
                log.warning("%s failed (%s); trying again in %s s", self.url, _kind(error), wait)
                time.sleep(wait)
        raise AssertionError("the last wait is None")


def open_ranges(file: StreamedFile) -> ReadRange:
    """What reads ranges of a streamed file; see :meth:`Storage.fill`."""
    storage, pinned = Storage(file.url.rpartition("/")[0]), Object(file.url, file.size, file.version)
    return lambda start, into: storage.fill(pinned, start, into)


def reserve(path: Path, size: int) -> None:
    """Give a file that is to be downloaded its length at once; what has not arrived takes no space on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab"):
        os.truncate(path, size)


class _Journal:
    """Which parts of a download arrived, one a line, so that the next attempt skips them."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self.done = set(path.read_text().splitlines()) if path.exists() else set[str]()

    def add(self, key: str) -> None:
        with self._lock, self._path.open("a") as file:
            file.write(f"{key}\n")

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def _counted(what: str, total: int, progress: Progress) -> Iterator[Callable[[int], None]]:
    """Count bytes from several threads; tell the bandwidth at the end."""
    started, done, lock = time.perf_counter(), 0, Lock()

    def advance(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, total)

    yield advance
    seconds = max(time.perf_counter() - started, 1e-9)
    log.info("%s: %.1f MB in %.1f s, %.1f MB/s", what, total / 1e6, seconds, total / 1e6 / seconds)


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for transfers; after a failure what has not begun is dropped."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_Item = TypeVar("_Item")


def _all(pool: ThreadPoolExecutor, work: Callable[[_Item], None], items: Sequence[_Item]) -> None:
    for future in [pool.submit(work, item) for item in items]:
        future.result()


def _filesystem(scheme: str, url: str) -> Any:
    import fsspec

    options = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        # s3fs tries each request again by itself, parts of an upload too; botocore's attempts would multiply with its.
        retries = {"total_max_attempts": 1}
        options["config_kwargs"] = {"retries": retries, "connect_timeout": 10, "read_timeout": 60}  # type: ignore[assignment]
    try:
        return fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        raise RecipeError(
            f"{url}: nothing installed serves {scheme}:// ({error}). Install its fsspec package."
        ) from error


def _version(info: Mapping[str, Any]) -> str:
    told = next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "created") if info.get(key)), "")
    return str(told).strip('"').replace(" ", "")


def _modified(info: Mapping[str, Any]) -> float | None:
    told = next((info[key] for key in ("LastModified", "last_modified", "mtime", "created") if info.get(key)), None)
    if isinstance(told, datetime):
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    return float(told) if isinstance(told, int | float) else None


def _kind(error: BaseException) -> str:
    """What failed, without the client's own text: it may hold signed addresses."""
    return f"{type(error).__name__}{f' {error.errno}' if isinstance(error, OSError) and error.errno else ''}"
