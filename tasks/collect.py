"""Garbage collection: remove what nothing pinned, accepted by a watch, recent or running leads to."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from merging_core.errors import CheckpointError
from tasks.judges.kept import REPLIES
from tasks.sources.object_storage import DOWNLOADS
from tasks.store import KINDS, MANIFEST, Ref, Store, remove
from tasks.usage import collecting
from tasks.watch.state import accepted_scores

_REMOVED: Final = ".removed"


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection removed, or would remove."""

    artifacts: tuple[Ref, ...]
    leftovers: tuple[Path, ...]
    """Folders that interrupted runs left half done, downloads that nothing uses, and old replies of judges."""
    num_bytes: int
    kept: int
    """Artifacts that stay."""


def pin(ref: Ref, store: Store) -> None:
    """Keep an artifact, and all that it was made from, through every collection.

    Raises:
        CheckpointError: if it is not in the store.
    """
    store.manifest(ref)
    _pins(store).mkdir(parents=True, exist_ok=True)
    (_pins(store) / f"{ref.kind}-{ref.digest}").touch()


def unpin(ref: Ref, store: Store) -> None:
    """Let an artifact be collected again."""
    (_pins(store) / f"{ref.kind}-{ref.digest}").unlink(missing_ok=True)


def pinned(store: Store) -> list[Ref]:
    """Every pinned artifact, sorted."""
    names = [path.name.rpartition("-") for path in _pins(store).glob("*")]
    return sorted(Ref(kind, digest) for kind, _, digest in names)


def collect(store: Store, keep_days: float, *, delete: bool) -> Garbage:
    """Find what no pinned artifact, no artifact made in the last days and no running process leads to.

    The scores of checkpoints that a watch accepted count as pinned. An artifact that stays keeps all of its parents.
    Files that are used in place are never touched: of a checkpoint that was only referenced, the reference goes.
    Downloads of the store's own go with the last that uses them. The replies that an endpoint judge kept go when none
    was added in the last days and no running process has them open.

    Args:
        store: is locked for as long as this takes: runs wait before they start to use another artifact.
        keep_days: age from which an artifact may be removed, in days since it was made, >= 0.
        delete: remove it; otherwise only say what would be removed.

    Raises:
        CheckpointError: if what a watch remembers cannot be read.
    """
    with collecting(store.root) as used:
        parents, created = _read(store)
        oldest = datetime.now(UTC) - timedelta(days=keep_days)
        roots = {ref for ref in parents if created[ref] > oldest or f"{ref.kind}/{ref.digest}" in used}
        kept = _reachable(roots | set(pinned(store)) | accepted_scores(store), parents)
        garbage = sorted(set(parents) - kept)
        leftovers = [path for path in _leftovers(store, kept, used) if path.stat().st_mtime < oldest.timestamp()]
        found = Garbage(
            artifacts=tuple(garbage),
            leftovers=tuple(leftovers),
            num_bytes=sum(_num_bytes(path) for path in [*(store.home(ref) for ref in garbage), *leftovers]),
            kept=len(kept & set(parents)),
        )
        doomed = _set_aside([*(store.home(ref) for ref in garbage), *leftovers], store) if delete else []
    for path in doomed:
        remove(path)
    return found


def _read(store: Store) -> tuple[dict[Ref, list[Ref]], dict[Ref, datetime]]:
    """Parents of every artifact, and when it was made; one whose record is damaged counts as recent."""
    parents, created = {}, {}
    for ref in store.refs():
        parents[ref], created[ref] = list[Ref](), datetime.now(UTC) + timedelta(days=1)
        with suppress(CheckpointError, ValueError):
            manifest = store.manifest(ref)
            parents[ref] = [Ref(*parent.split("/")) for parent in manifest.parents]
            created[ref] = datetime.fromisoformat(manifest.created)
    return parents, created


def _reachable(roots: Iterable[Ref], parents: dict[Ref, list[Ref]]) -> set[Ref]:
    pending, found = list(roots), set[Ref]()
    while pending:
        if (ref := pending.pop()) not in found:
            found.add(ref)
            pending += parents.get(ref, [])
    return found


def _leftovers(store: Store, kept: set[Ref], used: set[str]) -> list[Path]:
    """Half-done folders whose maker is not running, what no kept artifact or running process uses of downloads and
    replies, what was set aside before.
    """
    found = list((store.root / _REMOVED).glob("*"))
    found += [path for path in (store.root / REPLIES).glob("*") if f"{REPLIES}/{path.name}" not in used]
    folders = set[Path]()
    for ref in kept:
        with suppress(CheckpointError):
            folders.add(store.folder(ref).resolve())
    for path in (store.root / DOWNLOADS).glob("*"):
        place = path.name.removeprefix(".").removesuffix(".partial")
        if path.resolve() not in folders and not store.is_locked(f"download-{place}"):
            found.append(path)
    for kind in KINDS:
        for path in (store.root / kind).glob(".*"):
            digest = path.name.split(".")[1]
            if not store.is_locked(f"{kind}-{digest}"):
                found.append(path)
    return sorted(found)


def _set_aside(paths: Iterable[Path], store: Store) -> list[Path]:
    """Rename folders and files, so that each is gone at once; the slow removal needs no lock."""
    aside = store.root / _REMOVED
    aside.mkdir(parents=True, exist_ok=True)
    moved = []
    for number, path in enumerate(paths):
        target = aside / f"{time.time_ns()}-{number}"
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)
        path.rename(target)
        moved.append(target)
    return moved


def _num_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _pins(store: Store) -> Path:
    return store.root / "pins"
