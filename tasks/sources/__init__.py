"""Sources: what a recipe names, pinned to content and recorded as a checkpoint in the store."""

import difflib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from merging_core.digest import digest_of
from merging_core.errors import CheckpointError, RecipeError
from merging_core.streamed import is_note, is_streamed, require_files
from tasks.progress import Progress, silent
from tasks.sources.names import is_data_recipe
from tasks.store import KINDS, Built, Ref, Store

_MODELS: Final = ("checkpoint", "merged", "adapter")
_DIGEST_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class Pinned:
    """A source pinned to content."""

    folder: Path
    """Where the files lie; a README.md with the licence may lie beside them."""
    files: dict[str, dict[str, Any]]
    """Name of each file here to its ``size`` in bytes, ``sha256`` and ``mtime_ns``; a note for a streamed one."""
    content: dict[str, str]
    """Name of each content file to its sha256, streamed or not."""
    origin: str
    """Where it came from, for people: ``hf://org/name@<commit>`` or an absolute path."""


def resolve(source: str, store: Store, *, progress: Progress = silent) -> Built:
    """Pin a source to content and record it as an artifact of kind ``checkpoint``.

    A local folder and a Hub repository are referenced in place: the digest covers names and contents of the files,
    so equal folders are the same checkpoint wherever they lie. Every file is read once, later only if it changed.

    Args:
        source: a folder, ``hf://org/name@revision``, ``s3://bucket/prefix``, ``mini3h://role``,
            ``store://kind/digest`` for a model that is in the store or its mirror, or the path of a data recipe,
            ``name.yaml?seed=0``, for the model that is trained on it.
        store: where the record goes.
        progress: called with bytes hashed so far and bytes in all.

    Raises:
        RecipeError: if the source is not of a known form.
        CheckpointError: if it cannot be fetched, or is not a complete checkpoint.
    """
    if is_data_recipe(source):
        from tasks.sources.data_recipe import resolve_data_recipe

        return resolve_data_recipe(source, store)
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme not in _SCHEMES:
        near = difflib.get_close_matches(scheme.lower(), _SCHEMES, n=1, cutoff=0)[0]
        form = _SCHEMES["hf" if "huggingface" in source else near][0]
        raise RecipeError(
            f"{source}: scheme {scheme!r} does not exist. Nearest: {form}. "
            f"All: {', '.join(form for form, _ in _SCHEMES.values())}."
        )
    return _SCHEMES[scheme][1](source, store, progress)


def _from_folder(source: str, store: Store, progress: Progress) -> Built:
    from tasks.sources.local import pin

    folder = Path(source).expanduser().absolute()
    # What a note says of content was checked for the store's own only.
    require_files(folder, source)
    return _record(pin(folder, source, str(folder), store.root / "hashes", progress), store)


def _from_hub(source: str, store: Store, progress: Progress) -> Built:
    from tasks.sources.hub import fetch
    from tasks.sources.local import pin

    snapshot = fetch(source)
    return _record(pin(snapshot.folder, source, snapshot.origin, store.root / "hashes", progress), store)


def _from_object_storage(source: str, store: Store, progress: Progress) -> Built:
    from tasks.sources.local import pin
    from tasks.sources.object_storage import fetch

    folder = fetch(source, store, progress)
    return _record(pin(folder, source, source, store.root / "hashes", silent), store)


def _from_store(source: str, store: Store, progress: Progress) -> Built:
    started, text = perf_counter(), source.removeprefix("store://")
    kind, _, digest = text.partition("/")
    # A whole digest may be in the mirror alone; a beginning is looked up here.
    ref = Ref(kind, digest) if len(digest) == _DIGEST_LENGTH and kind in KINDS else store.lookup(text)
    if ref.kind not in _MODELS:
        raise RecipeError(f"{source}: {ref.kind} is no model. Name one of: {', '.join(_MODELS)}.")
    if not store.bring(ref):
        where = f" and in the mirror {store.mirror}" if store.mirror else "; there is no mirror"
        raise CheckpointError(f"{source}: not whole in the store {store.root}{where}. Make it again.")
    return Built(ref, True, perf_counter() - started)


def _from_mini3h(source: str, store: Store, progress: Progress) -> Built:
    from tasks.sources.mini3h import resolve_mini3h

    return resolve_mini3h(source, store, progress)


_SCHEMES: Final[dict[str, tuple[str, Callable[[str, Store, Progress], Built]]]] = {
    "": ("a local folder", _from_folder),
    "hf": ("hf://org/name@revision", _from_hub),
    "s3": ("s3://bucket/prefix", _from_object_storage),
    "gs": ("gs://bucket/prefix", _from_object_storage),
    "az": ("az://container/prefix", _from_object_storage),
    "store": ("store://kind/digest", _from_store),
    "mini3h": ("mini3h://role", _from_mini3h),
}
"""Scheme to its form, for messages, and to what resolves it."""


def _record(pinned: Pinned, store: Store) -> Built:
    identity = {"files": pinned.content}
    details = {"location": str(pinned.folder), "files": pinned.files, "origin": pinned.origin}
    if is_streamed(pinned.folder):
        # The mirror would send or want all files of it.
        store = Store(store.root)
    with suppress(CheckpointError):  # there is no record yet, or a damaged one
        _follow(pinned, Ref("checkpoint", digest_of(identity)), store)
    return store.build("checkpoint", identity, lambda folder: details)


def _follow(pinned: Pinned, ref: Ref, store: Store) -> None:
    """Let the record of streamed content point to where it is now: uploaded again, at another address, downloaded."""
    from tasks.sources.object_storage import DOWNLOADS

    known = store.manifest(ref)
    notes = [Path(str(known.location)) / name for name in known.files if is_note(Path(name))]
    if not notes or (known.location, known.files) == (str(pinned.folder), pinned.files):
        return
    store.relocate(ref, pinned.folder, pinned.files)
    # Aligned checkpoints that link to a note are no longer whole without it, and made again.
    current = {pinned.folder / name for name in pinned.files}
    for path in notes:
        if path not in current and path.is_relative_to((store.root / DOWNLOADS).resolve()):
            path.unlink(missing_ok=True)
