"""The artifact store: what was computed once is found again by what determined it.

Layout: ``<root>/<kind>/<digest>/`` holds the files of an artifact and ``manifest.json``. The folder appears by one
rename, after every file and the manifest were flushed to disk, so a folder without a manifest does not exist.
The digest is the sha256 of the artifact's identity (parents' digests, settings that change bytes, algorithm version).
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from merging_core.digest import digest_of, file_sha256
from merging_core.errors import CheckpointError, ProcessError, RecipeError, StorageError
from tasks.usage import note_use, using

if TYPE_CHECKING:
    from tasks.mirror import Mirror

KINDS: Final = (
    *("checkpoint", "adapter", "tokenizer", "task-vectors", "statistics", "calibration", "shard", "merged"),
    *("interference", "data", "generations", "scores", "report", "publication"),
)
# Their makers go on with what an interrupted run left in the folder.
RESUMED: Final = ("task-vectors", "merged")
# What may pass: another attempt may succeed.
_PASSING: Final = (StorageError, ProcessError)
MANIFEST: Final = "manifest.json"
NOTES: Final = ".notes"
"""Folder in which a maker keeps what it needs to go on; no part of the artifact."""
_RECORDED_PACKAGES: Final = (
    *("tripoise", "torch", "transformers", "safetensors", "lm_eval", "tokenizers", "prefect"),
    *("trl", "peft", "datasketch", "optuna"),
)

log = logging.getLogger("tripoise.store")


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """Names one artifact: small, JSON-able, valid on every machine that can reach the store."""

    kind: str
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest[:12]}"


@dataclass(frozen=True, slots=True)
class Built:
    """What asking for an artifact gave: its name, whether it already existed, and the seconds spent now."""

    ref: Ref
    reused: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of one artifact, written last. It answers "what produced you?" years later."""

    kind: str
    digest: str
    identity: dict[str, Any]
    parents: list[str]
    files: dict[str, dict[str, Any]]
    """Name to ``size`` in bytes, ``sha256`` and ``mtime_ns``: a file that was written to since is noticed on reuse."""
    created: str
    seconds: float
    versions: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)
    """What is worth knowing but does not change the bytes: the recipe as given, a source's name, diagnostics."""
    location: str | None = None
    """Folder of files that are used in place; None where the files lie in the store."""

    def text(self) -> str:
        """What stands in its file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


class Store:
    """A folder of finished artifacts, safe to share between processes of one machine.

    With a mirror, what another machine made is fetched instead of made again; see :mod:`tasks.mirror`.
    """

    def __init__(self, root: Path | str, mirror: str | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.mirror = mirror

    @classmethod
    def default(cls) -> "Store":
        """The store named by ``TRIPOISE_STORE``, else ``~/.cache/tripoise``; its mirror by ``TRIPOISE_MIRROR``."""
        return cls(os.environ.get("TRIPOISE_STORE") or "~/.cache/tripoise", os.environ.get("TRIPOISE_MIRROR") or None)

    def home(self, ref: Ref) -> Path:
        """Folder of the artifact's manifest, whether or not it exists."""
        return self.root / ref.kind / ref.digest

    def folder(self, ref: Ref) -> Path:
        """Folder of the artifact's files: in the store, or in place for a checkpoint that was only referenced."""
        location = self.manifest(ref).location
        return Path(location) if location else self.home(ref)

    def manifest(self, ref: Ref) -> Manifest:
        """Read the artifact's record.

        Raises:
            CheckpointError: if there is no such artifact or its manifest cannot be read.
        """
        path = self.home(ref) / MANIFEST
        try:
            return Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(
                f"{ref}: not in the store {self.root}. List what is there with `tripoise store ls`."
            ) from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a manifest ({error}). Remove its folder; the artifact can be made again."
            ) from error

    def find(self, kind: str, identity: Mapping[str, Any]) -> Ref | None:
        """The finished artifact with this identity, if it is here or in the mirror."""
        ref = Ref(kind, digest_of(identity))
        return ref if self.has(ref) or (self.mirror and self._mirror().has(ref)) else None

    def bring(self, ref: Ref) -> bool:
        """Whether a finished artifact is here, whole, after a look into the mirror.

        Raises:
            CheckpointError: if the mirror cannot be read.
        """
        if self.has(ref):
            return True
        with self.lock(f"{ref.kind}-{ref.digest}"):
            return self.has(ref) or self._fetch(ref)

    def is_locked(self, name: str) -> bool:
        """Whether a living process holds the lock ``name``."""
        try:
            with (self.root / "locks" / name).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def build(
        self,
        kind: str,
        identity: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any] | None],
        parents: Sequence[Ref] = (),
    ) -> Built:
        """Return the artifact with this identity; compute it only if nobody has, and only once.

        Two callers that want the same artifact: one computes, the other waits and reuses. The lock is freed by the
        kernel when its holder dies. What a dead or interrupted holder left half done is handed to ``make`` again for
        the kinds in ``RESUMED``, and removed for the others.

        Args:
            kind: one of ``KINDS``.
            identity: everything that determines the bytes; see :func:`merging_core.digest.canonical_json`.
            make: writes the files into the folder it is given; may return details for the manifest, in which
                ``location`` names the folder of files that stay in place and ``files`` their records.
            parents: artifacts this one was made from; those that are not here are looked for in the mirror.

        Raises:
            CheckpointError: if the disk is full, or a parent is nowhere. Whatever ``make`` raises passes through.
                Nothing is left behind, except for the kinds in ``RESUMED`` what a StorageError or ProcessError stopped.
        """
        started = time.perf_counter()
        ref = Ref(kind, digest_of(identity))
        if self.has(ref):
            return Built(ref, True, time.perf_counter() - started)
        with self.lock(f"{kind}-{ref.digest}"):
            if self.has(ref) or self._fetch(ref):
                return Built(ref, True, time.perf_counter() - started)
            with full_disk_told(str(ref), self.root, "nothing half-written was kept"):
                self._make(ref, identity, make, parents, started)
        self._copy_to_mirror(ref)
        return Built(ref, False, time.perf_counter() - started)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the exclusive lock ``name`` of this store on this machine; waits for whoever holds it."""
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another run that holds %s", name)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def relocate(self, ref: Ref, location: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Let an artifact's record point to other files of the same content; whoever reads it sees one or the other."""
        partial = self.home(ref) / f".{MANIFEST}"
        with self.lock(f"{ref.kind}-{ref.digest}"):
            moved = replace(self.manifest(ref), location=str(location), files={**files})  # type: ignore[dict-item]
            partial.write_text(moved.text(), encoding="utf-8")
            flush(partial)
            partial.rename(self.home(ref) / MANIFEST)

    def refs(self, kind: str | None = None) -> list[Ref]:
        """Every finished artifact, sorted; of one kind if named."""
        kinds = (kind,) if kind else KINDS
        return sorted(
            Ref(name, path.parent.name) for name in kinds for path in (self.root / name).glob(f"[!.]*/{MANIFEST}")
        )

    def lookup(self, text: str) -> Ref:
        """The artifact that ``kind/digest`` or an unambiguous beginning of a digest names.

        Raises:
            RecipeError: if none or several match.
        """
        kind, _, start = text.rpartition("/")
        if kind and kind not in KINDS:
            raise RecipeError(f"{text!r}: {kind!r} is not a kind of artifact. Kinds: {', '.join(KINDS)}.")
        found = [ref for ref in self.refs(kind or None) if ref.digest.startswith(start)]
        if len(found) != 1:
            what = "no artifact matches" if not found else f"{len(found)} artifacts match"
            raise RecipeError(f"{text!r}: {what} in {self.root}. Name one as `tripoise store ls` prints it.")
        return found[0]

    def problems(self, ref: Ref) -> list[str]:
        """Compare every file of an artifact with its recorded size and sha256; an empty list means intact."""
        try:
            manifest = self.manifest(ref)
        except CheckpointError as error:
            return [str(error)]
        folder = Path(manifest.location) if manifest.location else self.home(ref)
        found = []
        for name, record in manifest.files.items():
            path = folder / name
            if not path.is_file():
                found.append(f"{path}: missing")
            elif path.stat().st_size != record["size"]:
                found.append(f"{path}: {path.stat().st_size} bytes, recorded {record['size']}")
            elif file_sha256(path) != record["sha256"]:
                found.append(f"{path}: its content differs from the recorded sha256")
        return found

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is there, with all of its files; from now on it counts as used by this process."""
        if not (self.home(ref) / MANIFEST).is_file():
            return False
        with using(self.root):
            if usable := self._is_whole(ref):
                note_use(self.root, f"{ref.kind}/{ref.digest}")
            return usable

    def _is_whole(self, ref: Ref) -> bool:
        try:
            manifest = self.manifest(ref)
        except CheckpointError as error:
            log.warning("%s Making it again.", error)
            return False
        folder = Path(manifest.location) if manifest.location else self.home(ref)
        for name, record in manifest.files.items():
            try:
                stat = (folder / name).stat()
            except OSError:
                stat = None
            if (
                stat is None
                or stat.st_size != record["size"]
                or record.get("mtime_ns", stat.st_mtime_ns) != stat.st_mtime_ns
            ):
                log.warning("%s: %s is missing or changed since it was recorded; making it again", ref, folder / name)
                return False
        return True

    def _mirror(self) -> "Mirror":
        from tasks.mirror import Mirror

        return Mirror(str(self.mirror))

    def _fetch(self, ref: Ref) -> bool:
        """Take an artifact from the mirror, if there is one that has it; a broken download goes on next time."""
        if not self.mirror:
            return False
        partial = self.home(ref).with_name(f".{ref.digest}.fetched")
        if (manifest := self._mirror().pull(ref, partial)) is None:
            return False
        self._finish(partial, manifest)
        return True

    def _copy_to_mirror(self, ref: Ref) -> None:
        if not self.mirror:
            return
        try:
            self._mirror().push(ref, self)
        except CheckpointError as error:
            log.warning("%s is not in the mirror: %s `tripoise store push` tries it again.", ref, error)

    def _finish(self, partial: Path, manifest: Manifest) -> None:
        """Let a complete folder appear in the store, in one piece."""
        home = self.home(Ref(manifest.kind, manifest.digest))
        (partial / MANIFEST).write_text(manifest.text(), encoding="utf-8")
        flush_folder(partial)
        # Last, since whoever is killed after this has to compute all again.
        remove(partial / NOTES)
        remove(home)
        with using(self.root):
            os.rename(partial, home)
            note_use(self.root, f"{manifest.kind}/{manifest.digest}")
        flush(home.parent)

    def _make(
        self,
        ref: Ref,
        identity: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any] | None],
        parents: Sequence[Ref],
        started: float,
    ) -> None:
        for parent in parents:
            if not self.home(parent).exists() and not self.bring(parent):
                where = f" and not in the mirror {self.mirror}" if self.mirror else ", and there is no mirror"
                raise CheckpointError(
                    f"{ref}: is made from {parent}, which is not in the store {self.root}{where}. Make or resolve it "
                    "on this machine; a streamed checkpoint is in no mirror and needs a store that all machines share."
                )
        partial = self.home(ref).with_name(f".{ref.digest}.partial")
        if ref.kind not in RESUMED:
            remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            (partial / MANIFEST).unlink(missing_ok=True)
            details = dict(make(partial) or {})
            if changed := [str(parent) for parent in parents if not self.has(parent)]:
                raise CheckpointError(
                    f"{ref}: {', '.join(changed)} changed while it was being used. Leave its files alone and run again."
                )
            manifest = Manifest(
                kind=ref.kind,
                digest=ref.digest,
                identity=dict(identity),
                parents=[f"{parent.kind}/{parent.digest}" for parent in parents],
                location=details.pop("location", None),
                files=details.pop("files", None)
                or {name: record for name, record in record_files(partial).items() if not name.startswith(NOTES)},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - started, 3),
                versions=package_versions(),
                details=details,
            )
            self._finish(partial, manifest)
        except BaseException as error:
            # An interrupt is no Exception. What failed by itself would fail again, and a full disk needs its space.
            if ref.kind not in RESUMED or (isinstance(error, Exception) and not isinstance(error, _PASSING)):
                remove(partial)
            raise


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The record of every file below ``folder``, by its path relative to it."""
    return {
        path.relative_to(folder).as_posix(): record_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def record_file(path: Path) -> dict[str, Any]:
    """Size, sha256 and time of change of one file."""
    stat = path.stat()
    return {"size": stat.st_size, "sha256": file_sha256(path), "mtime_ns": stat.st_mtime_ns}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed: int, what: str) -> None:
    """Raise a CheckpointError if the disk of ``path`` has less than ``needed`` bytes free for ``what``."""
    if (free := free_bytes(path)) < needed:
        raise CheckpointError(
            f"{what} needs {needed:,} bytes in {path}, {free:,} are free: the disk is full. "
            "Free some space or name another folder."
        )


@contextlib.contextmanager
def full_disk_told(what: str, root: Path, left: str) -> Iterator[None]:
    """Turn the failure of a full disk into a CheckpointError: subject, the store's root, and what is left there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{what}: the disk of {root} is full ({free_bytes(root):,} bytes free). "
            f"Free some space or name another store with --store; {left}."
        ) from error


def flush_folder(folder: Path) -> None:
    """Flush everything below ``folder`` and the folder itself to disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Flush one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder and all below it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
