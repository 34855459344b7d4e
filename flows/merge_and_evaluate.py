"""The flow ``merge-and-evaluate``: one recipe, merged, scored and compared with what it was made from."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.approval import decision, published
from flows.parameters import MergeAndEvaluate
from flows.pipeline import Exam, Kitchen, Pinned, pin_recipe
from flows.pools import runner
from flows.shown import completed, show_model, show_plan
from tasks.orchestration import TASK_RUNNER, publish
from tasks.recipes import recipe_yaml
from tasks.reporting import Entry, report_step
from tasks.steps import Runner
from tasks.store import Ref, Store


def _run_name() -> str:
    request = MergeAndEvaluate.model_validate(flow_run.parameters["request"])
    return f"{request.recipe.method.name} · {request.suite} · {len(request.recipe.experts)} experts"


@flow(name="merge-and-evaluate", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def merge_and_evaluate(request: MergeAndEvaluate) -> dict[str, Any]:
    """You get a merged model, its scores beside those of base and experts, and a report."""
    run = runner(Store.default())
    Exam.of(request, run)  # what it refuses is refused before anything is fetched
    pinned = pin_recipe(request.recipe.recipe(), run)
    # What was shown before somebody decided is still shown; the plan would now say that everything is reused.
    first = not (request.approval and decision())
    if first:
        show_plan(lambda planner: merge_and_score(request, planner, pinned), run.store)
    model, report = merge_and_score(request, run, pinned)
    if first:
        publish(report, run.store)
        show_model(model, run.store)
    where = published(model, request.publish_to, request.approval, run.store)
    return completed(merged=f"{model.kind}/{model.digest}", report=f"{report.kind}/{report.digest}", **where)


def merge_and_score(request: MergeAndEvaluate, run: Runner, pinned: Pinned | None = None) -> tuple[Ref, Ref]:
    """The merged model and the report on it.

    Args:
        request: what is merged and evaluated.
        run: runs the steps.
        pinned: base and experts, where they were resolved before.
    """
    recipe, exam, done_by = request.recipe.recipe(), Exam.of(request, run), request.execution
    kitchen = Kitchen.of(recipe, run, done_by.device, done_by.timeout_minutes, pinned)
    merged = kitchen.merge(recipe)
    models = {expert.name: kitchen.complete(expert, recipe.base) for expert in recipe.experts}
    title = recipe.method.name
    base = kitchen.sources.base
    asked = [(base, "base"), *((ref, name) for name, ref in models.items()), (merged, title)]
    first, *tuned, last = exam.scores_of(asked)
    entries = [
        Entry("base", "base", base, first),
        *(Entry(name, "expert", ref, own) for (name, ref), own in zip(models.items(), tuned, strict=True)),
        Entry(title, "merged", merged, last, recipe=recipe_yaml(recipe)),
    ]
    interference = kitchen.compare()
    second, heading = exam.second_opinions(entries), f"{title} on {exam.suite.title}"
    step = report_step(heading, exam.suite, entries, interference, run.store, second)
    [report] = run.build("report", "report", [step])
    return merged, report
