"""The flow ``decompose``: what merges by a recipe need of its experts, made ahead of them."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.parameters import Decompose
from flows.pipeline import Kitchen, pin_recipe
from flows.pools import gpu_slot
from flows.shown import completed, show_lines
from tasks.orchestration import TASK_RUNNER, AsPrefectTasks
from tasks.store import Store


def _run_name() -> str:
    recipe = Decompose.model_validate(flow_run.parameters["request"]).recipe
    return f"decompose for {recipe.method.name} · {recipe.base.rpartition('/')[2]} · {len(recipe.experts)} experts"


@flow(name="decompose", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def decompose(request: Decompose) -> dict[str, Any]:
    """You get the task vectors of a recipe's experts in the store; merges by any scale, weight or subset reuse them."""
    run, recipe = AsPrefectTasks(Store.default()), request.recipe.recipe()
    pinned = pin_recipe(recipe, run)
    with gpu_slot():
        kitchen = Kitchen.of(recipe, run, request.device, request.timeout_minutes, pinned)
        made = kitchen.prepare(recipe)
    show_lines("made", f"{len(made)} artifacts", [f"{ref.kind}/{ref.digest}" for ref in made])
    return completed(num_made=len(made), made=[f"{ref.kind}/{ref.digest}" for ref in made])
