"""The models of a comparison: grouped by seed, refused where they cannot be compared, chosen for their roles."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from merging_core.errors import RecipeError
from tasks.comparison.notes import Chosen
from tasks.comparison.records import DIMENSIONS, Benchmark, ModelSamples, Split
from tasks.comparison.statistics import ModelScores
from tasks.names import repeated

# For each name, its models in the order of the seeds.
Members = Sequence[Sequence[ModelSamples]]


def by_seed(models: Sequence[ModelSamples]) -> dict[int, list[ModelSamples]]:
    """Seed to its models, in the order of their names."""
    found: dict[int, list[ModelSamples]] = {}
    for model in sorted(models, key=lambda m: m.name):
        found.setdefault(model.seed, []).append(model)
    return found


def require_comparable(families: Mapping[int, Sequence[ModelSamples]], benchmarks: Sequence[Benchmark]) -> None:
    """Refuse a suite, or a set of models, that cannot be compared.

    Raises:
        RecipeError: no model, a repeated name, a dimension without a benchmark, two bases, seeds of different models.
    """
    if not families:
        raise RecipeError("comparison: at least one model is needed, got none. Name a base, an expert or a merge.")
    listed = [("model", [m.name for m in models]) for models in families.values()]
    for what, names in (*listed, ("benchmark", [b.task for b in benchmarks])):
        if twice := repeated(names):
            raise RecipeError(f"comparison: each {what} may appear once, got {twice} repeatedly. Rename or drop one.")
    if empty := [d for d in DIMENSIONS if d not in {b.dimension for b in benchmarks}]:
        raise RecipeError(
            f"comparison: every dimension needs a benchmark, got none for {', '.join(empty)}. Add one to the suite."
        )
    every = {(model.name, model.role) for models in families.values() for model in models}
    for seed, models in families.items():
        if len(bases := [m.name for m in models if m.role == "base"]) > 1:
            raise RecipeError(f"comparison: at most one base is expected, got {bases}. Compare one family at a time.")
        if lost := sorted(every - {(model.name, model.role) for model in models}):
            raise RecipeError(
                f"comparison: seed {seed} has no {lost[0][1]} {lost[0][0]!r}, which another seed has. "
                "Score the same models in every seed."
            )


def choose(members: Members, scores: Sequence[ModelScores]) -> Chosen:
    """Find the base and the best of each other role: by validation mean where all of a role have one, else by test."""
    best: dict[str, int | None] = {}
    split: dict[str, Split] = {}
    for role in ("expert", "mixture", "merged", "tsvm"):
        group = [
            i for i, own in enumerate(members) if role in (own[0].role, own[0].role == "merged" and _method(own[0]))
        ]
        validations = {i: mean_validation(members[i]) for i in group}
        validated = all("mean" in found for found in validations.values())
        means = {i: validations[i]["mean"] if validated else scores[i].mean.value for i in group}
        best[role] = max(group, key=means.__getitem__, default=None)
        split[role] = "validation" if validated else "test"
    base = next((i for i, own in enumerate(members) if own[0].role == "base"), None)
    return Chosen(base=base, **best, split=split)


def _method(model: ModelSamples) -> str | None:
    name = model.settings.get("method")
    return name if isinstance(name, str) else None


def mean_validation(models: Sequence[ModelSamples]) -> dict[str, float]:
    """Mean over the seeds of what every seed has."""
    shared = [key for key in models[0].validation if all(key in model.validation for model in models)]
    return {key: fmean(model.validation[key] for model in models) for key in shared}
