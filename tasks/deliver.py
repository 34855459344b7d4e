"""Output folders: filled beside their place and moved there by rename, never half written."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from merging_core.errors import CheckpointError, RecipeError
from merging_core.streamed import require_files
from tasks.model_card import scores_section
from tasks.scores import scores_of
from tasks.store import MANIFEST, Ref, Store, flush, flush_folder, free_bytes, record_file, remove


def deliver_artifact(ref: Ref, out: Path, store: Store, replace: bool = False) -> None:
    """Make ``out`` a copy of a stored artifact.

    Weights are hard links where store and ``out`` share a disk, so the copy costs no space; they are read-only.
    The card of a merged model also tells the scores that the store holds of it: in the store it was written before.

    Raises:
        RecipeError: see :func:`check_replaceable`.
        CheckpointError: if its weights are streamed from object storage.
    """
    source = store.folder(ref)
    require_files(source, str(ref))

    def fill(folder: Path) -> None:
        for path in sorted(source.rglob("*")):
            target = folder / path.relative_to(source)
            if path.is_dir():
                target.mkdir()
            elif path.suffix == ".safetensors":
                _link_or_copy(path, target)
            else:
                shutil.copyfile(path, target)
        if ref.kind == "merged":
            _tell_scores(folder, ref, store)

    deliver(out, fill, ref, replace)


def deliver(out: Path, fill: Callable[[Path], None], ref: Ref, replace: bool = False) -> None:
    """Fill a folder and put it in the place of ``out``; of two deliveries to one place, one after the other.

    Args:
        out: absent, empty, or an earlier delivery of the same artifact.
        fill: writes into an empty folder beside ``out``; must write a ``manifest.json`` with kind, digest and files.
        ref: what is delivered.
        replace: whether ``out`` may hold something else, which is then removed.

    Raises:
        RecipeError: see :func:`check_replaceable`.
        CheckpointError: if the disk is full; ``out`` is as it was.
    """
    out = out.expanduser().resolve()
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    with _lock(out):
        if old.exists() and not out.exists():
            os.rename(old, out)  # an earlier delivery was killed between its two renames
        check_replaceable(out, ref.kind, replace, ref.digest)
        remove(partial)
        remove(old)
        partial.mkdir(parents=True)
        try:
            fill(partial)
            flush_folder(partial)
            if out.exists():
                os.rename(out, old)
            try:
                os.rename(partial, out)
            except BaseException:
                if old.exists():
                    os.rename(old, out)
                raise
            flush(out.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{out}: the disk is full ({free_bytes(out.parent):,} bytes free). Free some space or name another "
                "folder with --out; it is as it was."
            ) from error
        finally:
            remove(partial)
        remove(old)


def check_replaceable(
    out: Path, kind: str, replace: bool, digest: str | None = None, protected: Iterable[Path] = ()
) -> None:
    """Refuse an output folder that cannot be written, or that holds something of value.

    Args:
        out: where a delivery shall go.
        kind: kind of the artifact.
        replace: whether another artifact or foreign files may be removed.
        digest: of the artifact, once it is known.
        protected: files and folders that must not vanish, whatever ``replace`` says: the store, the sources.

    Raises:
        RecipeError: if ``out`` is a file; is or contains the current folder or a protected place; cannot be created;
            or, unless ``replace`` is set, holds anything but the same artifact. Nothing is changed.
    """
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file, a folder is expected. Name another place with --out.")
    for place in (Path.cwd(), *protected):
        if place.expanduser().resolve().is_relative_to(out):
            raise RecipeError(
                f"{out}: is or contains {place}, which would be replaced. Name another folder with --out."
            )
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"{out}: cannot be created, {parent} is not a folder one may write to. Name another --out.")
    if replace or not out.is_dir() or not any(out.iterdir()):
        return
    if what := _other_than(out, kind, digest):
        raise RecipeError(f"{out}: holds {what}. Name another folder, or replace it with --replace.")


def _other_than(out: Path, kind: str, digest: str | None) -> str | None:
    """What a folder holds besides an artifact; None if it is just that artifact."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        held, listed = Ref(str(manifest["kind"]), str(manifest["digest"])), {*manifest["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        return "files that Tripoise did not write"
    if held.kind != kind or digest not in (None, held.digest):
        return f"another artifact ({held})"
    foreign = sorted({path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} - listed)
    return f"{len(foreign)} files that Tripoise did not write, first {foreign[0]!r}" if foreign else None


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; it lies outside, since the folder is replaced and the store may be another."""
    name = hashlib.sha256(str(out).encode()).hexdigest()[:32]
    with (Path(tempfile.gettempdir()) / f"tripoise-{os.getuid()}-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell_scores(folder: Path, ref: Ref, store: Store) -> None:
    """Add a model's scores to its card, and the card's new record to the manifest."""
    card, manifest = folder / "README.md", folder / MANIFEST
    if card.exists() and (scores := scores_of(ref, store)):
        card.write_text(card.read_text(encoding="utf-8") + "\n" + scores_section(scores), encoding="utf-8")
        record = json.loads(manifest.read_text(encoding="utf-8"))
        record["files"][card.name] = record_file(card)
        manifest.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        path.chmod(0o444)
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
