"""What is asked of GPU workers: requests to the flows ``merge``, ``decompose`` and ``evaluate``, as plain JSON."""

from dataclasses import replace
from typing import Any

from flows.evaluation import Evaluation, JudgeChoices
from merging_core.errors import CheckpointError
from merging_core.recipe import Recipe
from tasks.align import Family
from tasks.judges.steps import Judges
from tasks.recipes import RecipeModel
from tasks.steps import Request
from tasks.store import Ref, Store
from tasks.suite import Split, Suite


def merge_request(
    recipe: Recipe, sources: Family, device: str, store: Store, timeout_minutes: float | None = None
) -> Request:
    """Merge by a recipe; see :class:`flows.parameters.Merge`."""
    return Request("merge/merge", {"request": _merge(recipe, sources, device, store, timeout_minutes)})


def decompose_request(
    recipe: Recipe, sources: Family, device: str, store: Store, timeout_minutes: float | None = None
) -> Request:
    """Make what a recipe needs of its experts; see :class:`flows.parameters.Decompose`."""
    return Request("decompose/decompose", {"request": _merge(recipe, sources, device, store, timeout_minutes)})


def evaluate_request(
    asked: Evaluation, suite: Suite, model: Ref, split: Split, limit: int | None, judges: Judges
) -> Request:
    """Score one model; see :class:`flows.evaluate.Evaluate`.

    Args:
        asked: names suite, data and execution.
        suite: as loaded, maybe with another world.
        model: a checkpoint or a merged model.
        split: validation or test.
        limit: samples of each benchmark; None: the request's own limit.
        judges: question to its judge.
    """
    said = asked.model_dump(mode="json", include={"suite", "data_dir", "execution"})
    choices = JudgeChoices.model_validate(dict(judges)).model_dump(mode="json")
    said |= {"model": f"store://{model.kind}/{model.digest}", "split": split, "judges": choices}
    said |= {"limit": limit or asked.limit, "world_seed": suite.world_seed}
    return Request("evaluate/evaluate", {"request": said})


def _merge(recipe: Recipe, sources: Family, device: str, store: Store, timeout_minutes: float | None) -> dict[str, Any]:
    return {"recipe": _pinned(recipe, sources, store), "device": device, "timeout_minutes": timeout_minutes}


def _pinned(recipe: Recipe, sources: Family, store: Store) -> dict[str, Any]:
    """A recipe whose hub repositories are named by commit: a branch may move before the other machine asks for it."""
    experts = [replace(one, source=_origin(one.source, sources.experts[one.name], store)) for one in recipe.experts]
    pinned = replace(recipe, base=_origin(recipe.base, sources.base, store), experts=tuple(experts))
    model = RecipeModel.model_validate({name: getattr(pinned, name) for name in RecipeModel.model_fields})
    return model.model_dump(mode="json")


def _origin(source: str, ref: Ref, store: Store) -> str:
    if not source.startswith("hf://"):
        return source
    try:
        return str(store.manifest(ref).details.get("origin") or source)
    except CheckpointError:  # planned only
        return source
