"""Where checkpoints lie in a source: folders of a folder, prefixes of a prefix, branches of a repository.

Looking lists and reads beginnings of files; nothing is downloaded or hashed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from merging_core.errors import CheckpointError, RecipeError
from tasks.remote import Object, Storage
from tasks.watch.uploads import is_checkpoint, missing_parts

_HUB: Final = "hf://"
ITSELF: Final = "."
"""Name of the place that is the watched folder or prefix itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint as it looks from outside."""

    name: str
    """Within its source: a folder, a prefix, a branch or a tag."""
    source: str
    """What :func:`tasks.sources.resolve` takes."""
    stamp: str
    """Changes whenever a file does: what has the same stamp needs no second look."""
    changed: float | None = None
    """When it was last written to, in seconds since 1970; None: it cannot change, or nobody tells."""
    lacks: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)
    """What is still missing of it, from its index and headers; empty if nothing is seen to be."""


def look(source: str) -> list[Place]:
    """The checkpoints of a watched source, oldest change first; of a Hub repository ``main`` first, then by name.

    A folder of which it cannot be seen whether it is one is given too: that it cannot be read is said when it is asked
    what it lacks.

    Args:
        source: a folder; ``s3://bucket/prefix`` or any URL that fsspec knows; ``hf://org/name`` for all branches and
            tags of a repository, ``hf://org/name@branch`` for one.

    Raises:
        RecipeError: if the source is of no form that can be watched.
        CheckpointError: if it is not there, or cannot be reached.
    """
    check_form(source)
    if source.startswith(_HUB):
        from tasks.watch.revisions import revisions

        return revisions(source)
    found = _prefixes(source) if "://" in source else _folders(source)
    return sorted(found, key=lambda one: (one.changed or 0.0, one.name))


def check_form(source: str) -> None:
    """See whether a source is of a form that can be watched; asks nobody.

    Raises:
        RecipeError: if it is not.
    """
    if source.startswith("mini3h://"):
        raise RecipeError(f"{source}: is made here and never changes. Watch a folder, s3:// or hf://.")
    if source.startswith(_HUB):
        from tasks.watch.revisions import repository

        repository(source)
    elif "://" in source:
        Storage(source)


def _folders(source: str) -> list[Place]:
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        raise CheckpointError(f"{source}: no folder {root}. Check the path, and that its disk is mounted.")
    try:
        below = [path for path in root.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise CheckpointError(_unreadable(source, error)) from error
    found = [_folder(path, ITSELF if path == root else path.name) for path in (root, *below)]
    return [one for one in found if one]


def _unreadable(source: str, error: OSError) -> str:
    return f"{source}: {error.filename} cannot be read ({error.strerror}). Check its permissions."


def _folder(folder: Path, name: str) -> Place | None:
    try:
        if not folder.is_dir():
            return None
        stats = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
        own = folder.stat()
    except FileNotFoundError:
        return None  # went while it was looked at; the next look tells
    except OSError as error:
        why = _unreadable(str(folder), error)

        def refuse() -> str:
            raise CheckpointError(why)

        return Place(name, str(folder), stamp="", lacks=refuse)
    if not is_checkpoint(stats):
        return None
    stamps = {file: [one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino] for file, one in stats.items()}

    def head(file: str, num_bytes: int) -> bytes:
        with (folder / file).open("rb") as opened:
            return opened.read(num_bytes)

    return Place(
        name=name,
        source=str(folder),
        stamp=_stamp(stamps),
        # The times of status changes: those of modification are often copied from the original. A folder's own time
        # tells of files that came, went or got their final name; in the watched folder, other checkpoints do.
        changed=max(([] if name == ITSELF else [own.st_ctime]) + [one.st_ctime for one in stats.values()]),
        lacks=lambda: _lacks({file: one.st_size for file, one in stats.items()}, head),
    )


def _prefixes(source: str) -> list[Place]:
    root = Storage(source)
    folders = {name: Storage(f"{root.url}/{name}") for name in root.folders()}
    found = [_prefix(storage, name) for name, storage in ({ITSELF: root} | folders).items()]
    if places := [one for one in found if one]:
        return places
    raise CheckpointError(f"{source}: holds no checkpoints. Check bucket, prefix and the credentials in use.")


def _prefix(storage: Storage, name: str) -> Place | None:
    listed: dict[str, Object] = storage.list()
    if not is_checkpoint(listed):
        return None
    times = [one.modified for one in listed.values() if one.modified is not None]
    return Place(
        name=name,
        source=storage.url,
        stamp=_stamp({file: [one.size, one.version] for file, one in listed.items()}),
        changed=max(times, default=None),
        lacks=lambda: _lacks({file: one.size for file, one in listed.items()}, lambda f, n: storage.head(f, n) or b""),
    )


def _lacks(sizes: Mapping[str, int], head: Callable[[str, int], bytes]) -> str:
    try:
        return missing_parts(sizes, head)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} went away"


def _stamp(files: Mapping[str, list[object]] | Mapping[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
