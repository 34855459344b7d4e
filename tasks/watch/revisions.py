"""Branches and tags of a Hub repository as places of checkpoints: a commit never changes, so its name is its stamp."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not marked so

from merging_core.checkpoint import INDEX
from merging_core.errors import CheckpointError, RecipeError
from tasks.sources.hub import FAILURES, TIMEOUT_S, failure_text, parse, retried
from tasks.watch.places import Place
from tasks.watch.uploads import missing_parts


def revisions(source: str) -> list[Place]:
    """One place for each commit that a branch or a tag of a repository names, ``main`` first, then by name.

    When a commit was made is not asked: the Hub tells it only with all of its history.

    Raises:
        RecipeError: if ``source`` is not of the form ``hf://org/name`` or ``hf://org/name@revision``.
        CheckpointError: if repository or revision do not exist or need a permission, or the Hub cannot be reached.
    """
    repo, named = repository(source)
    try:
        if named:
            commits = {named: _commit(repo, named)}
        else:
            refs = retried(lambda: HfApi().list_repo_refs(repo))
            commits = {one.name: one.target_commit for one in (*refs.branches, *refs.tags)}
    except FAILURES as error:
        raise CheckpointError(failure_text(source, named or constants.DEFAULT_REVISION, error)) from error
    found: dict[str, Place] = {}
    for name in sorted(commits, key=lambda one: (one != constants.DEFAULT_REVISION, one)):
        commit = commits[name]
        found.setdefault(commit, Place(name, f"hf://{repo}@{commit}", commit, lacks=_lacking(repo, commit)))
    return list(found.values())


def repository(source: str) -> tuple[str, str | None]:
    """Repository and revision, if one is named.

    Raises:
        RecipeError: if ``source`` is not of the form, or no repository can be called so.
    """
    repo, named = parse(source)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"{source}: {repo!r} cannot be the name of a repository. Check the spelling.") from error
    return repo, named


def _commit(repo: str, revision: str) -> str:
    return str(retried(lambda: HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)).sha)


def _lacking(repo: str, commit: str) -> Callable[[], str]:
    """What a commit lacks: a large model may be uploaded in several commits."""

    def head(name: str, num_bytes: int) -> bytes:
        # The Hub takes a file whole or not at all, so that headers need not be read.
        if name != INDEX:
            return b""
        return Path(retried(lambda: hf_hub_download(repo, name, revision=commit))).read_bytes()

    def lacks() -> str:
        source = f"hf://{repo}@{commit}"
        try:
            info = retried(lambda: HfApi().model_info(repo, revision=commit, timeout=TIMEOUT_S, files_metadata=True))
            return missing_parts({one.rfilename: one.size or 0 for one in info.siblings or ()}, head)
        except FAILURES as error:
            raise CheckpointError(failure_text(source, commit, error)) from error

    return lacks
