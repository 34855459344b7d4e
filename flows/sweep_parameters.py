"""Parameters of the flow ``sweep``: what its run form, the API and sweep files may say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from flows.evaluation import Evaluation
from merging_core.errors import RecipeError
from tasks.names import check_names
from tasks.recipes import RecipeModel, parse_recipe, read_yaml, validated
from tasks.sweep.proposals import SamplerName, sampler
from tasks.sweep.settings import Pruning, Searched
from tasks.sweep.space import Space


class Sweep(Evaluation):
    """Try many recipes on validation, and report the best of them on test."""

    title: str = Field(default="Sweep", title="Title", description="Heads the report.", min_length=1)
    recipe: RecipeModel = Field(title="Recipe", description="What every trial starts from.")
    search: list[Searched] = Field(
        title="Search space", description="Settings of the recipe that are varied, and how.", min_length=1
    )
    sampler: SamplerName = Field(
        default="tpe",
        title="Sampler",
        description="tpe learns from the trials before, for all three H at once; random does not; grid tries all.",
    )
    trials: int = Field(
        default=20, title="Trials", description="How many recipes are tried; of a grid, at most.", ge=1, le=10_000
    )
    seed: int = Field(default=0, title="Seed", description="Of the sampler: equal seeds try equal recipes.", ge=0)
    pruning: Pruning | None = Field(
        default=None,
        title="Pruning",
        description="Trials answer a few samples first, and clearly worse ones no more. Left out: all answer all.",
    )
    keep: int = Field(
        default=3,
        title="Keep",
        description="How many trials of the Pareto set are evaluated on test, at most.",
        ge=1,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Everything that can be refused before anything runs: paths, values, the size of a grid."""
        space = self.space()
        if self.sampler == "grid":
            sampler(self.sampler, space, self.trials, self.seed)
        if self.pruning and self.limit is not None and self.pruning.limit >= self.limit:
            raise RecipeError(f"pruning: limit must be below the sweep's, got {self.pruning.limit} and {self.limit}.")
        return self

    def space(self) -> Space:
        """The recipe and what is varied in it."""
        return Space(self.recipe.recipe(), self.search)

    def searched(self) -> dict[str, Any]:
        """How is searched, JSON-able: what the report records."""
        told = {"search", "sampler", "trials", "seed", "pruning", "keep", "limit"}
        return self.model_dump(mode="json", include=told)


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep file: ``search`` is a mapping of path to a list, or to ``{low, high, log, step}``.

    Raises:
        RecipeError: naming the entry, what was expected and, for a misspelt name, the nearest right one.
    """
    data: dict[str, Any] = read_yaml(path)
    subject = f"sweep {path.name}"
    check_names(subject, data, Sweep.model_fields)
    if isinstance(data.get("recipe"), Mapping):
        recipe = parse_recipe(data["recipe"])
        data["recipe"] = {name: getattr(recipe, name) for name in RecipeModel.model_fields}
    if isinstance(search := data.get("search"), Mapping):
        data["search"] = [_searched(str(at), what) for at, what in search.items()]
    sweep: Sweep = validated(Sweep, data, subject)
    return sweep


def _searched(path: str, what: Any) -> dict[str, Any]:
    if isinstance(what, list):
        return {"path": path, "values": what}
    if not isinstance(what, Mapping):
        raise RecipeError(f"search {path}: expected a list of values or {{low, high}}, got {what!r}.")
    check_names(f"search {path}", what, ("low", "high", "step", "log"))
    return {"path": path, **what}
