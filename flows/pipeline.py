"""What both flows have in common: pin the models, prepare ingredients once, merge, evaluate."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from flows.elsewhere import decompose_request, evaluate_request, merge_request
from flows.evaluation import Evaluation, first_judges
from merging_core.adapter import is_adapter
from merging_core.errors import RecipeError
from merging_core.methods import TaskArithmetic
from merging_core.methods.base import CalibratedMethod, SpectralMethod
from merging_core.recipe import Expert, Recipe
from merging_core.vocabulary import TokenizerPolicy
from tasks.align import Family, align
from tasks.backends import Endpoint
from tasks.calibrate import calibrate_step, require_texts
from tasks.evaluate import EvaluateSettings, Execution, evaluate_steps
from tasks.judges.steps import Judges, judge_step, require_judges
from tasks.merge import merge_step
from tasks.reporting import Entry, SecondOpinion
from tasks.steps import Request, Runner, Step
from tasks.store import Ref
from tasks.suite import Split, Suite
from tasks.vectors import (
    decompose_settings,
    decompose_step,
    interference_step,
    measure_step,
    require_compatible,
    require_rules,
)

Pinned = tuple[Ref, dict[str, Ref]]
"""The base of a recipe, and its experts by name."""


def pin(sources: Mapping[str, str], run: Runner) -> dict[str, Ref]:
    """Resolve named sources to checkpoints, each source once."""
    distinct = list(dict.fromkeys(sources.values()))
    found = dict(zip(distinct, run.resolve(distinct), strict=True))
    return {name: found[source] for name, source in sources.items()}


def pin_recipe(recipe: Recipe, run: Runner) -> Pinned:
    """The base of a recipe, then its experts by name: an expert may be trained from the base."""
    require_texts(recipe)
    base = pin({"base": recipe.base}, run)["base"]
    return base, pin({expert.name: expert.source for expert in recipe.experts}, run)


@dataclass(slots=True)
class Kitchen:
    """One base with its experts within a run: every ingredient is asked for once, however many recipes need it."""

    run: Runner
    base: Ref
    experts: Mapping[str, Ref]
    device: str = "cpu"
    """Torch device, or several separated by commas, that merge."""
    tokenizer: TokenizerPolicy | None = None
    """How experts with more tokens than the base are aligned with it; then ``base`` and ``experts`` are the aligned."""
    timeout_minutes: float | None = None
    """Of one merge, or of what one expert needs for it; None: no limit."""
    sources: Family = field(init=False)
    _built: set[Ref] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        run: Runner,
        device: str = "cpu",
        timeout_minutes: float | None = None,
        pinned: Pinned | None = None,
    ) -> Self:
        """The kitchen of one recipe, whose base and experts are resolved now unless they are ``pinned``."""
        base, experts = pinned or pin_recipe(recipe, run)
        return cls(run, base, experts, device, recipe.tokenizer, timeout_minutes)

    def __post_init__(self) -> None:
        require_compatible(self.base, self.experts, self.run.store, to_be_aligned=self.tokenizer is not None)
        self.sources = Family(self.base, self.experts)
        aligned, steps = align(self.sources, self.tokenizer, self.run.store)
        if steps:
            self.run.build("align", "align tokenizers", steps)
        self.base, self.experts = aligned.base, aligned.experts

    def merge(self, recipe: Recipe) -> Ref:
        """Merge by a recipe, decomposing, measuring and calibrating experts as its method needs it."""
        require_rules(recipe, self.base, self.run.store)
        decompose, measure, calibrate = self._ingredients(recipe)
        vectors = {name: step.ref for name, step in decompose.items()}
        statistics = {name: step.ref for name, step in measure.items()}
        calibration = {name: step.ref for name, step in calibrate.items()}
        merge = merge_step(
            recipe,
            self.base,
            self.experts,
            vectors,
            statistics,
            calibration,
            self.run.store,
            self.device,
            self.sources,
        )
        is_merged = self.run.store.find(merge.kind, merge.identity) is not None
        for name in self.experts:
            for what, steps in (("decompose", decompose), ("measure", measure), ("calibrate", calibrate)):
                # What was removed from the store after its merge is not computed again for nothing.
                if name in steps and not (is_merged and self._is_missing(steps[name])):
                    self._once(what, steps[name])
        request = merge_request(recipe, self.sources, self.device, self.run.store, self.timeout_minutes)
        [merged] = self.run.build(
            "merge", merge.title, [replace(merge, elsewhere=request, timeout_minutes=self.timeout_minutes)]
        )
        return merged

    def prepare(self, recipe: Recipe) -> list[Ref]:
        """Make what merges by a recipe need of its experts.

        Raises:
            RecipeError: if the recipe's method needs nothing.
        """
        require_rules(recipe, self.base, self.run.store)
        found = []
        for what, steps in zip(("decompose", "measure", "calibrate"), self._ingredients(recipe), strict=True):
            for step in steps.values():
                self._once(what, step)
                found.append(step.ref)
        if not found:
            raise RecipeError(f"method {recipe.method.name}: needs no task vectors. Merge by it right away.")
        return found

    def _ingredients(self, recipe: Recipe) -> tuple[dict[str, Step], dict[str, Step], dict[str, Step]]:
        """What is decomposed, measured and calibrated, by expert; empty where the method does not need it."""
        method, store = recipe.method, self.run.store
        decompose, measure, calibrate = dict[str, Step](), dict[str, Step](), dict[str, Step]()
        for expert in recipe.experts:
            name, ref = expert.name, self.experts[expert.name]
            if isinstance(method, SpectralMethod):
                kept = decompose_settings(method, len(recipe.experts))
                decompose[name] = decompose_step(self.base, ref, name, kept, store, self.device)
                if method.statistics:
                    measure[name] = measure_step(self.base, ref, name, method.statistics, store)
            if isinstance(method, CalibratedMethod):
                model = self.complete(expert, recipe.base, Family(self.base, self.experts))
                calibrate[name] = calibrate_step(expert, model, method.calibration, store, self.device)
        request = decompose_request(recipe, self.sources, self.device, store, self.timeout_minutes)
        for steps in (decompose, measure, calibrate):
            steps |= {
                name: replace(step, elsewhere=request, timeout_minutes=self.timeout_minutes)
                for name, step in steps.items()
            }
        return decompose, measure, calibrate

    def complete(self, expert: Expert, base: str, family: Family | None = None) -> Ref:
        """An expert as a model that can be asked: an adapter is added to its base.

        Args:
            expert: of a recipe.
            base: how the recipe calls the base.
            family: where the checkpoints lie; default: as the recipe names them, before any alignment.
        """
        family, store = family or self.sources, self.run.store
        ref = family.experts[expert.name]
        if not (store.home(ref).exists() and is_adapter(store.folder(ref))):
            return ref
        alone = Recipe(base=base, experts=(replace(expert, weight=1.0),), method=TaskArithmetic())
        step = merge_step(alone, family.base, {expert.name: ref}, {}, {}, {}, store, self.device)
        self._once("merge", replace(step, title=f"complete {expert.name}", timeout_minutes=self.timeout_minutes))
        return step.ref

    def compare(self) -> Ref:
        """How the updates of the experts agree."""
        [interference] = self.run.build(
            "compare", "compare experts", [interference_step(self.base, self.experts, self.run.store)]
        )
        return interference

    def _is_missing(self, step: Step) -> bool:
        return self.run.store.find(step.kind, step.identity) is None

    def _once(self, what: str, step: Step) -> None:
        if step.ref not in self._built:
            self.run.build(what, step.title, [step])
            self._built.add(step.ref)


def score(
    models: Sequence[tuple[Ref, str]],
    suite: Suite,
    settings: EvaluateSettings,
    execution: Execution,
    run: Runner,
    judges: Judges,
    endpoint: Endpoint | None = None,
    elsewhere: Callable[[Ref], Request | None] = lambda model: None,
) -> list[list[Ref]]:
    """Evaluate models on every benchmark of a suite, then let judges decide what only a reader can.

    Args:
        models: checkpoints or merged models, for an endpoint its tokenizer; and how titles call them.
        suite: what is run.
        settings: what is asked.
        execution: device, batch size and backend.
        run: runs the steps.
        judges: question to its judge; see :func:`tasks.judges.steps.require_judges`.
        endpoint: where the model is served; default: it is run here.
        elsewhere: how a GPU worker is asked for all scores of a model.

    Returns:
        The scores of each model, in the order of the suite.

    Raises:
        RecipeError: if a question of the suite has no judge, before anything is computed.
    """
    require_judges(suite, judges)

    def all_of(what: str, steps_of: Callable[[int, Ref, str], list[Step]]) -> list[list[Ref]]:
        groups = []
        for number, (model, name) in enumerate(models):
            steps = [
                replace(step, elsewhere=elsewhere(model), timeout_minutes=execution.timeout_minutes)
                for step in steps_of(number, model, name)
            ]
            groups.append((f"{what} {name} ({settings.split})", steps))
        return run.map(what, groups)

    scores = all_of(
        "evaluate",
        lambda _, model, name: evaluate_steps(model, name, suite, settings, run.store, execution, endpoint),
    )
    asking = [(place, one, judges[one.question]) for place, one in enumerate(suite.benchmarks) if one.question]
    if asking:
        verdicts = all_of(
            "judge",
            lambda number, _, name: [
                judge_step(scores[number][place], one, name, judge, run.store) for place, one, judge in asking
            ],
        )
        for found, judged in zip(scores, verdicts, strict=True):
            for (place, _, _), ref in zip(asking, judged, strict=True):
                found[place] = ref
    return scores


@dataclass(frozen=True, slots=True)
class Exam:
    """How every model of a run is evaluated, within one seed."""

    request: Evaluation
    suite: Suite
    run: Runner
    called: str = ""
    """What titles add to a model's name."""

    @classmethod
    def of(cls, request: Evaluation, run: Runner, world_seed: int | None = None) -> Self:
        """The exam of a request, refused before anything is computed if a question of its suite has no judge."""
        suite = request.loaded_suite()
        if suite.world and world_seed is not None:
            suite = replace(suite, world_seed=world_seed)
        require_judges(suite, first_judges(request.judges))
        return cls(request, suite, run)

    def scores(self, model: Ref, name: str, split: Split = "test", limit: int | None = None) -> list[Ref]:
        """Scores of one model on every benchmark of the suite; see :func:`score`."""
        [scores] = self.scores_of([(model, name)], split, limit)
        return scores

    def scores_of(
        self, models: Sequence[tuple[Ref, str]], split: Split = "test", limit: int | None = None
    ) -> list[list[Ref]]:
        """Scores of several models, each with its name, which may be evaluated at the same time."""
        return self._scores(models, split, limit, first_judges(self.request.judges))

    def second_opinions(self, entries: Iterable[Entry]) -> list[SecondOpinion]:
        """What the second judges say of the responses on test; of several responses to one prompt none is asked."""
        second = self.request.second_judges.chosen()
        asked = [
            place for place, one in enumerate(self.suite.benchmarks) if one.question in second and one.samples == 1
        ]
        if not asked:
            return []
        read = list(entries)
        judges = first_judges(self.request.judges) | second
        again = self._scores([(entry.model, entry.name) for entry in read], "test", None, judges)
        return [
            SecondOpinion(entry.name + self.called, entry.scores[place], scores[place])
            for entry, scores in zip(read, again, strict=True)
            for place in asked
        ]

    def _scores(
        self, models: Sequence[tuple[Ref, str]], split: Split, limit: int | None, judges: Judges
    ) -> list[list[Ref]]:
        settings, execution = self.request.settings(split, limit), self.request.execution
        called = [(model, name + self.called) for model, name in models]

        def elsewhere(model: Ref) -> Request:
            return evaluate_request(self.request, self.suite, model, split, limit, judges)

        return score(called, self.suite, settings, execution, self.run, judges, elsewhere=elsewhere)
