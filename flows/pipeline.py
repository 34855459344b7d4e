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


@dataclass(slots=True)
class Kitchen:
    """One base with its experts within a run: every ingredient is asked for once, however many recipes need it."""

    run: Runner
    base: Ref
    experts: Mapping[str, Ref]
    _known: dict[tuple[str, str, object], Ref] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_compatible(self.base, self.experts, self.run.store)

    def merge(self, recipe: Recipe) -> Ref:
        """Merge by a recipe, decomposing and measuring experts as its method needs it."""
        method = recipe.method
        vectors: dict[str, Ref] = {}
        statistics: dict[str, Ref] = {}
        if isinstance(method, SpectralMethod):
            for name, expert in self.experts.items():
                kept = decompose_settings(recipe)
                vectors[name] = self._once(
                    "decompose", name, kept, decompose_step(self.base, expert, name, kept, self.run.store)
                )
                if wanted := method.statistics:
                    statistics[name] = self._once(
                        "measure", name, wanted, measure_step(self.base, expert, name, wanted, self.run.store)
                    )
        step = merge_step(recipe, self.base, self.experts, vectors, statistics, self.run.store)
        [merged] = self.run.build("merge", step.title, [step])
        return merged

    def _once(self, what: str, name: str, settings: object, step: Step) -> Ref:
        key = (what, name, settings)
        if key not in self._known:
            [self._known[key]] = self.run.build(what, step.title, [step])
        return self._known[key]


def score(
    model: Ref, name: str, suite: Suite, settings: EvaluateSettings, execution: Execution, run: Runner
) -> list[Ref]:
    """Evaluate one model on every benchmark of a suite."""
    steps = evaluate_steps(model, name, suite, settings, run.store, execution)
    return run.build("evaluate", f"evaluate {name} ({settings.split})", steps)
