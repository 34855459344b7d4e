"""The flow ``sweep``: many recipes tried on validation, a few of them reported on test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from prefect import flow
from prefect.runtime import flow_run

from flows.pipeline import Exam, Kitchen, Pinned, pin_recipe
from flows.reported import reported
from flows.shown import show_plan
from flows.sweep_parameters import Sweep
from merging_core.errors import RecipeError
from merging_core.recipe import Recipe
from tasks.comparison import Role
from tasks.merge import merge_title
from tasks.orchestration import TASK_RUNNER
from tasks.plan import Planner
from tasks.recipes import recipe_yaml
from tasks.reporting import Entry
from tasks.steps import Runner
from tasks.store import Ref
from tasks.suite import Split
from tasks.sweep.files import entry_name, outcome, sweep_report_step
from tasks.sweep.proposals import foreseen, sampler
from tasks.sweep.trials import Laboratory, run_trials


def _run_name() -> str:
    request = Sweep.model_validate(flow_run.parameters["request"])
    return f"{request.title} · {request.sampler} · {request.trials} trials"


@flow(name="sweep", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def sweep(request: Sweep) -> dict[str, Any]:
    """You get the Pareto set of the recipes that were tried, and a report on test of the best of them.

    Run again after a stop it goes on: equal trials are proposed, and what they gave is in the store.
    """

    def compose(run: Runner) -> Ref:
        pinned = pin_recipe(request.recipe.recipe(), run)
        show_plan(lambda planner: plan_search(request, planner, pinned), run.store)
        return search_recipes(request, run, pinned)

    return reported(compose)


def search_recipes(request: Sweep, run: Runner, pinned: Pinned | None = None) -> Ref:
    """The report of a sweep.

    Args:
        request: what is searched.
        run: runs the steps.
        pinned: base and experts, where they were resolved before.
    """
    search, space = _Search.of(request, run, pinned), request.space()
    # First, since a suite that cannot be run is refused here, and not trial by trial.
    validation = search.references("validation")
    laboratory = Laboratory(search.kitchen.merge, search.on_validation, search.exam.suite, run.store)
    proposed = sampler(request.sampler, space, request.trials, request.seed)
    found = outcome(run_trials(space, proposed, request.trials, request.pruning, laboratory), request.keep)

    entries = [
        Entry(name, role, model, test, own)
        for (name, role, model), test, own in zip(search.known, search.references("test"), validation, strict=True)
    ]
    for trial in (found.trials[number] for number in found.chosen):
        model, name = trial.model, entry_name(trial)
        assert model is not None
        assert trial.recipe is not None
        test = search.exam.scores(model, name)
        entries.append(Entry(name, "merged", model, test, trial.scores, recipe_yaml(trial.recipe)))
    interference, second = search.kitchen.compare(), search.exam.second_opinions(entries)
    step = sweep_report_step(
        request.title, search.exam.suite, entries, interference, found, request.searched(), run.store, second
    )
    [report] = run.build("report", "report", [step])
    return report


def plan_search(request: Sweep, planner: Planner, pinned: Pinned | None = None) -> None:
    """Ask for what no score decides, and say what scores decide; see :func:`search_recipes`."""
    search, space = _Search.of(request, planner, pinned), request.space()
    search.references("validation")
    search.references("test")
    search.kitchen.compare()
    points = foreseen(request.sampler, space, request.trials, request.seed)
    limit = request.pruning.limit if request.pruning else None
    for point in points:
        try:
            recipe = space.at(point)
            model = search.kitchen.merge(recipe)
        except RecipeError:
            continue  # the run records such a trial as refused
        search.on_validation(model, recipe, limit)
    if request.sampler == "tpe" and len(points) < request.trials:
        planner.unknown.append(f"the trials from {len(points)} on, proposed by the scores of those before")
    if request.pruning:
        planner.unknown.append("which trials are pruned, and the whole validation of the others")
    planner.unknown.append("which trials are tested, and the report")


@dataclass(frozen=True, slots=True)
class _Search:
    """A sweep whose models are pinned: what it asks for, however many trials there are."""

    exam: Exam
    kitchen: Kitchen
    known: Sequence[tuple[str, Role, Ref]]
    """Base and experts."""

    @classmethod
    def of(cls, request: Sweep, run: Runner, pinned: Pinned | None) -> Self:
        exam, recipe, done_by = Exam.of(request, run), request.recipe.recipe(), request.execution
        kitchen = Kitchen.of(recipe, run, done_by.device, done_by.timeout_minutes, pinned)
        known: list[tuple[str, Role, Ref]] = [("base", "base", kitchen.sources.base)]
        known += [(one.name, "expert", kitchen.complete(one, recipe.base)) for one in recipe.experts]
        return cls(exam, kitchen, known)

    def references(self, split: Split) -> list[list[Ref]]:
        """Scores of base and experts."""
        return self.exam.scores_of([(model, name) for name, _, model in self.known], split)

    def on_validation(self, model: Ref, recipe: Recipe, limit: int | None) -> list[Ref]:
        """Scores of a trial; with a limit, on the first samples only."""
        return self.exam.scores(model, merge_title(recipe), "validation", limit)
