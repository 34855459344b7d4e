"""What both flows have in common: pin the models, prepare ingredients once, merge, evaluate."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from merging_core.methods.base import SpectralMethod
from merging_core.recipe import Recipe
from tasks.evaluate import EvaluateSettings, Execution, evaluate_steps
from tasks.merge import merge_step
from tasks.steps import Runner, Step
from tasks.store import Ref
from tasks.suite import Suite
from tasks.vectors import decompose_settings, decompose_step, measure_step, require_compatible


def pin(sources: Mapping[str, str], run: Runner) -> dict[str, Ref]:
    """Resolve named sources to checkpoints, each source once."""
    distinct = list(dict.fromkeys(sources.values()))
    found = dict(zip(distinct, run.resolve(distinct), strict=True))
    return {name: found[source] for name, source in sources.items()}


def pin_recipe(recipe: Recipe, run: Runner) -> tuple[Ref, dict[str, Ref]]:
    """The base of a recipe, then its experts by name: an expert may be trained from the base."""
    base = pin({"base": recipe.base}, run)["base"]
    return base, pin({expert.name: expert.source for expert in recipe.experts}, run)


@dataclass(slots=True)
class Kitchen:
    """One base with its experts within a run: every ingredient is asked for once, however many recipes need it."""

    run: Runner
    base: Ref
    experts: Mapping[str, Ref]
    _built: set[Ref] = field(default_factory=set)

    def __post_init__(self) -> None:
        require_compatible(self.base, self.experts, self.run.store)

    def merge(self, recipe: Recipe) -> Ref:
        """Merge by a recipe, decomposing and measuring experts as its method needs it."""
        decompose, measure = self._ingredients(recipe)
        vectors = {name: step.ref for name, step in decompose.items()}
        statistics = {name: step.ref for name, step in measure.items()}
        merge = merge_step(recipe, self.base, self.experts, vectors, statistics, self.run.store)
        is_merged = self.run.store.find(merge.kind, merge.identity) is not None
        for name in self.experts:
            for what, steps in (("decompose", decompose), ("measure", measure)):
                # What was removed from the store after its merge is not computed again for nothing.
                if name in steps and not (is_merged and self._is_missing(steps[name])):
                    self._once(what, steps[name])
        [merged] = self.run.build("merge", merge.title, [merge])
        return merged

    def _ingredients(self, recipe: Recipe) -> tuple[dict[str, Step], dict[str, Step]]:
        method, store = recipe.method, self.run.store
        if not isinstance(method, SpectralMethod):
            return {}, {}
        kept, wanted = decompose_settings(recipe), method.statistics
        decompose = {name: decompose_step(self.base, ref, name, kept, store) for name, ref in self.experts.items()}
        if wanted is None:
            return decompose, {}
        return decompose, {
            name: measure_step(self.base, ref, name, wanted, store) for name, ref in self.experts.items()
        }

    def _is_missing(self, step: Step) -> bool:
        return self.run.store.find(step.kind, step.identity) is None

    def _once(self, what: str, step: Step) -> None:
        if step.ref not in self._built:
            self.run.build(what, step.title, [step])
            self._built.add(step.ref)


def score(
    model: Ref, name: str, suite: Suite, settings: EvaluateSettings, execution: Execution, run: Runner
) -> list[Ref]:
    """Evaluate one model on every benchmark of a suite."""
    steps = evaluate_steps(model, name, suite, settings, run.store, execution)
    return run.build("evaluate", f"evaluate {name} ({settings.split})", steps)
