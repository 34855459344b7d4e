"""Hugging Face Hub: a revision becomes a commit, and the commit's files land in the Hub's own cache.

Endpoint, cache, offline mode and token come from the environment, as huggingface_hub reads it (``HF_ENDPOINT``,
``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``). No code of a repository is ever run.
"""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import HfApi, constants, errors, snapshot_download

from merging_core.adapter import PICKLED_ADAPTER, is_adapter
from merging_core.adapter_config import ADAPTER_CONFIG
from merging_core.checkpoint import CONFIG
from merging_core.errors import CheckpointError, RecipeError
from tasks.sources.local import ADAPTER, COMPANIONS, SAFETENSORS, weight_names
from tasks.store import require_free

PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SOURCE: Final = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\w[\w./+-]*))?", re.ASCII)
_WAITS_S: Final = (0.5, 1.0, 2.0)
TIMEOUT_S: Final = 30.0
# The HTTP client's own error, whichever client huggingface_hub uses; and hf_xet reports a broken transfer as the last.
FAILURES: Final = (errors.HTTPError, OSError, RuntimeError)  # type: ignore[attr-defined]
_NOT_WRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_Result = TypeVar("_Result")

log = logging.getLogger("tripoise.sources")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files of one commit in the Hub's cache."""

    folder: Path
    origin: str
    """``hf://org/name@<commit>``, for people."""


def fetch(source: str, weights: tuple[str, str] = SAFETENSORS) -> Snapshot:
    """Ask the Hub for the commit of a revision and download what the commit's checkpoint or adapter needs.

    The revision is asked for every time; a file that is in the cache is not downloaded again. If the Hub cannot be
    reached, a commit, or a branch as last seen, that is complete in the cache serves, with a warning.

    Args:
        source: ``hf://org/name`` or ``hf://org/name@revision``; the default revision is ``main``.
        weights: names of the single weight file and of the index, ``SAFETENSORS`` or ``PICKLED``; with the former, a
            repository that holds an adapter and no complete model gives the adapter.

    Raises:
        RecipeError: if ``source`` is not of that form.
        CheckpointError: if repository or revision do not exist or need a permission, if the repository holds no such
            weights, if the disk is full, or if the Hub cannot be reached and the cache is not complete.
    """
    repo, named = parse(source)
    revision = named or constants.DEFAULT_REVISION
    try:
        folder = _online(source, repo, revision, weights) or _cached(source, repo, revision, weights)
    except errors.HFValidationError as error:
        raise RecipeError(f"{source}: {repo!r} cannot be the name of a repository. Check the spelling.") from error
    except FAILURES as error:
        raise CheckpointError(failure_text(source, revision, error)) from error
    return Snapshot(folder, f"hf://{repo}@{folder.name}")


def parse(source: str) -> tuple[str, str | None]:
    """Repository and revision, if one is named, of an ``hf://`` source.

    Raises:
        RecipeError: if it is not of that form.
    """
    match = _SOURCE.fullmatch(source)
    if not match or ".." in source:
        raise RecipeError(f"{source}: expected hf://org/name or hf://org/name@revision. Write it in that form.")
    return match["repo"], match["revision"]


def _online(source: str, repo: str, revision: str, weights: tuple[str, str]) -> Path | None:
    """Folder of the downloaded commit; None if the Hub does not answer."""
    try:
        info = retried(lambda: HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S, files_metadata=True))
    except FAILURES as error:
        if not _is_transient(error):
            raise
        log.warning("%s: the Hub cannot be reached (%s); looking in the cache", source, type(error).__name__)
        return None
    commit = str(info.sha)
    listed = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if weights == SAFETENSORS and ADAPTER_CONFIG in listed and not any(name in listed for name in weights):
        weights = ADAPTER
    _check_listing(source, listed, weights)
    small = [name for name in (_described_by(weights), *COMPANIONS, "README.md", weights[1]) if name in listed]
    folder = retried(lambda: _download(repo, commit, small))
    large = weight_names(folder, weights)
    if lost := [name for name in large if name not in listed]:
        raise CheckpointError(f"{source}: the repository lacks {len(lost)} shards of its index, first {lost[0]!r}.")
    missing = sum(listed[name] for name in large if not (folder / name).exists())
    require_free(folder, missing, f"{source}: the download")
    retried(lambda: _download(repo, commit, large))
    if revision != commit:
        _remember(folder, revision)
    return folder


def _cached(source: str, repo: str, revision: str, weights: tuple[str, str]) -> Path:
    """Folder of the commit in the cache, checked for completeness as far as the cache knows what belongs to it."""
    small = [ADAPTER_CONFIG, *COMPANIONS]
    folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=small))
    if weights == SAFETENSORS and is_adapter(folder):
        weights = ADAPTER
    snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=weight_names(folder, weights))
    if revision != folder.name:
        log.warning("%s: using commit %s of the cache, which may not be the newest", source, folder.name)
    return folder


def _check_listing(source: str, listed: Mapping[str, int], weights: tuple[str, str]) -> None:
    if (config := _described_by(weights)) not in listed:
        raise CheckpointError(f"{source}: the repository holds no {config}. Name a repository of a transformers model.")
    found = [name for name in weights if name in listed]
    if len(found) == 1:
        return
    if found:
        raise CheckpointError(f"{source}: holds both {' and '.join(found)}; one is stale. Name another revision.")
    if weights == ADAPTER and PICKLED_ADAPTER in listed:
        raise CheckpointError(
            f"{source}: holds a pickled adapter ({PICKLED_ADAPTER}), which can run code when loaded and is refused. "
            "Load it with peft where you trust it, and save it again: save_pretrained writes safetensors."
        )
    if weights == SAFETENSORS and any(name in listed for name in PICKLED):
        raise CheckpointError(
            f"{source}: holds pickled weights only, which can run code when loaded and are refused. "
            f"Convert them first: tripoise convert {source} --out FOLDER."
        )
    raise CheckpointError(f"{source}: the repository holds no {weights[0]} or {weights[1]}. Name one that does.")


def _described_by(weights: tuple[str, str]) -> str:
    return ADAPTER_CONFIG if weights == ADAPTER else CONFIG


def _download(repo: str, commit: str, names: Sequence[str]) -> Path:
    folder = Path(snapshot_download(repo, revision=commit, allow_patterns=list(names)))
    # Where the Hub fails meanwhile, huggingface_hub hands out what an earlier, broken download left.
    if lost := [name for name in names if not (folder / name).exists()]:
        raise ConnectionError(f"{len(lost)} files did not arrive, first {lost[0]!r}")
    return folder


def _remember(folder: Path, revision: str) -> None:
    """Note the commit of a branch in the cache, as huggingface_hub does, for later work offline."""
    path = folder.parent.parent / "refs" / revision
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # The cache may be mounted read-only; then there is just no such note.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(folder.name)
        os.replace(partial, path)


def retried(call: Callable[[], _Result]) -> _Result:
    """Call the Hub, again after a while if it fails for now."""
    for wait in _WAITS_S:
        try:
            return call()
        except FAILURES as error:
            if not _is_transient(error) or constants.HF_HUB_OFFLINE:
                raise
            log.warning("the Hub failed (%s); trying again in %s s", type(error).__name__, wait)
            time.sleep(wait)
    return call()


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return getattr(error, "errno", None) not in _NOT_WRITABLE


def failure_text(source: str, revision: str, error: BaseException) -> str:
    """What went wrong with the Hub, and what to do about it."""
    # The client's own text may hold signed addresses, so only the kind of error is passed on.
    log_in = "set HF_TOKEN or run `hf auth login`"
    match error:
        case errors.GatedRepoError():
            return f"{source}: is gated. Ask for access on its page, then {log_in}."
        case errors.RepositoryNotFoundError():
            return f"{source}: no such repository, or it is private. Check the name; for a private one {log_in}."
        case errors.RevisionNotFoundError():
            return f"{source}: the repository has no revision {revision!r}. Check its branches, tags and commits."
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{source}: no permission. To get it, {log_in}."
        case errors.HfHubHTTPError():
            return f"{source}: the Hub answered HTTP {error.response.status_code}. Try again later."
        case errors.LocalEntryNotFoundError():
            return (
                f"{source}: the Hub cannot be reached and revision {revision!r} is not complete in "
                f"{constants.HF_HUB_CACHE}. Connect (and unset HF_HUB_OFFLINE), or name a local folder."
            )
        case OSError() if error.errno in _NOT_WRITABLE:
            return f"{source}: cannot write {constants.HF_HUB_CACHE} ({error.strerror}). Set HF_HOME to another disk."
    return f"{source}: the download broke off ({type(error).__name__}). Run it again; complete files are kept."
