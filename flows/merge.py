"""The flow ``merge``: one recipe, merged."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.parameters import Merge
from flows.pipeline import Kitchen, pin_recipe
from flows.pools import gpu_slot
from flows.shown import completed, show_model
from tasks.orchestration import TASK_RUNNER, AsPrefectTasks
from tasks.store import Store


def _run_name() -> str:
    recipe = Merge.model_validate(flow_run.parameters["request"]).recipe
    return f"{recipe.method.name} · {recipe.base.rpartition('/')[2]} · {len(recipe.experts)} experts"


@flow(name="merge", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def merge(request: Merge) -> dict[str, Any]:
    """You get a merged model, as an artifact of the store."""
    run, recipe = AsPrefectTasks(Store.default()), request.recipe.recipe()
    pinned = pin_recipe(recipe, run)
    with gpu_slot():
        kitchen = Kitchen.of(recipe, run, request.device, request.timeout_minutes, pinned)
        merged = kitchen.merge(recipe)
    show_model(merged, run.store)
    return completed(merged=f"{merged.kind}/{merged.digest}")
