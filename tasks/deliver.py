"""Output folders: filled beside their place and moved there by one rename, never half written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from merging_core.errors import RecipeError
from tasks.store import MANIFEST, Ref, Store, flush, flush_folder, remove


def deliver_artifact(ref: Ref, out: Path, store: Store, replace: bool = False) -> None:
    """Make ``out`` a copy of a stored artifact.

    Weights are hard links where store and ``out`` share a disk, so the copy costs no space; they are read-only.

    Raises:
        RecipeError: see :func:`check_replaceable`.
    """
    source = store.folder(ref)

    def fill(folder: Path) -> None:
        for path in sorted(source.rglob("*")):
            target = folder / path.relative_to(source)
            if path.is_dir():
                target.mkdir()
            elif path.suffix == ".safetensors":
                _link_or_copy(path, target)
            else:
                shutil.copyfile(path, target)

    deliver(out, fill, ref, store, replace)


def deliver(out: Path, fill: Callable[[Path], None], ref: Ref, store: Store, replace: bool = False) -> None:
    """Fill a folder and put it in the place of ``out``.

    Args:
        out: absent, empty, or an earlier delivery of the same kind.
        fill: writes into an empty folder beside ``out``; must write a ``manifest.json`` with kind and digest.
        ref: what is delivered.
        store: whose lock keeps two deliveries apart.
        replace: whether ``out`` may hold something else, which is then removed.
    """
    out = out.absolute()
    check_replaceable(out, ref.kind, replace, ref.digest)
    with store.lock("deliver-" + ref.digest):
        partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
        remove(partial)
        partial.mkdir(parents=True)
        try:
            fill(partial)
            flush_folder(partial)
            remove(old)
            if out.exists():
                os.rename(out, old)
            os.rename(partial, out)
            flush(out.parent)
        finally:
            remove(partial)
            remove(old)


def check_replaceable(out: Path, kind: str, replace: bool, digest: str | None = None) -> None:
    """Refuse an output folder that holds something of value.

    Raises:
        RecipeError: if ``out`` is a file, or, unless ``replace`` is set, a folder with foreign files, a delivery of
            another kind, or a merged model other than ``digest``. Nothing is changed.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file, a folder is expected. Name another place with --out.")
    if replace or not out.is_dir() or not any(out.iterdir()):
        return
    held = _held(out)
    if held is None:
        what = "files that Tripoise did not write"
    elif held.kind != kind:
        what = f"an artifact of another kind ({held})"
    elif kind == "merged" and digest not in (None, held.digest):
        what = f"another merged model ({held})"
    else:
        return
    raise RecipeError(f"{out}: holds {what}. Name another folder, or replace it with --replace.")


def _held(out: Path) -> Ref | None:
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        return Ref(str(manifest["kind"]), str(manifest["digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        path.chmod(0o444)
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
