"""The flow ``sweep``: many recipes tried on validation, a few of them reported on test."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.pipeline import Exam, Kitchen, pin_recipe
from flows.reported import reported
from flows.sweep_parameters import Sweep
from merging_core.recipe import Recipe
from tasks.comparison import Role
from tasks.merge import merge_title
from tasks.orchestration import TASK_RUNNER
from tasks.recipes import recipe_yaml
from tasks.reporting import Entry
from tasks.steps import Runner
from tasks.store import Ref
from tasks.sweep.files import entry_name, outcome, sweep_report_step
from tasks.sweep.proposals import sampler
from tasks.sweep.trials import Laboratory, run_trials
from tasks.vectors import interference_step


def _run_name() -> str:
    request = Sweep.model_validate(flow_run.parameters["request"])
    return f"{request.title} · {request.sampler} · {request.trials} trials"


@flow(name="sweep", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def sweep(request: Sweep) -> dict[str, Any]:
    """You get the Pareto set of the recipes that were tried, and a report on test of the best of them.

    Run again after a stop it goes on: equal trials are proposed, and what they gave is in the store.
    """
    return reported(lambda run: search_recipes(request, run))


def search_recipes(request: Sweep, run: Runner) -> Ref:
    """The report of a sweep."""
    exam, space = Exam.of(request, run), request.space()
    recipe = space.recipe
    base, experts = pin_recipe(recipe, run)
    kitchen = Kitchen(run, base, experts, request.execution.device, recipe.tokenizer)

    def on_validation(model: Ref, recipe: Recipe, limit: int | None) -> list[Ref]:
        return exam.scores(model, merge_title(recipe), "validation", limit)

    # First, since a suite that cannot be run is refused here, and not trial by trial.
    known: list[tuple[str, Role, Ref]] = [("base", "base", base)]
    known += [(one.name, "expert", kitchen.complete(one, recipe.base)) for one in recipe.experts]
    validation = {name: exam.scores(model, name, "validation") for name, _, model in known}

    laboratory = Laboratory(kitchen.merge, on_validation, exam.suite, run.store)
    proposed = sampler(request.sampler, space, request.trials, request.seed)
    found = outcome(run_trials(space, proposed, request.trials, request.pruning, laboratory), request.keep)

    entries = [Entry(name, role, model, exam.scores(model, name), validation[name]) for name, role, model in known]
    for trial in (found.trials[number] for number in found.chosen):
        model, name = trial.model, entry_name(trial)
        assert model is not None
        assert trial.recipe is not None
        entries.append(Entry(name, "merged", model, exam.scores(model, name), trial.scores, recipe_yaml(trial.recipe)))
    compare = interference_step(kitchen.base, kitchen.experts, run.store)
    [interference] = run.build("compare", "compare experts", [compare])
    second = exam.second_opinions(entries)
    step = sweep_report_step(
        request.title, exam.suite, entries, interference, found, request.searched(), run.store, second
    )
    [report] = run.build("report", "report", [step])
    return report
