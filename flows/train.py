"""The flow ``train``: a data recipe, mixed, and a model trained on the mixture."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from flows.pools import gpu_slot
from flows.shown import completed
from tasks.data.recipe import DataRecipe
from tasks.orchestration import TASK_RUNNER, AsPrefectTasks
from tasks.steps import Runner
from tasks.store import Ref, Store
from tasks.training.mixture import mixture, trained


class Train(BaseModel):
    """Train one model on a mixture of data, as a baseline for merges."""

    model_config = ConfigDict(extra="forbid")
    recipe: DataRecipe = Field(title="Data recipe", description="What is mixed, and how the model is trained.")


def _run_name() -> str:
    recipe = Train.model_validate(flow_run.parameters["request"]).recipe
    return f"{recipe.selection.name} · {recipe.training.paradigm} · {len(recipe.datasets)} datasets"


@flow(name="train", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def train(request: Train) -> dict[str, Any]:
    """You get the mixed data and the model that was trained on them."""
    with gpu_slot():
        data, model = mix_and_train(request.recipe, AsPrefectTasks(Store.default()))
    return completed(data=f"{data.kind}/{data.digest}", model=f"{model.kind}/{model.digest}")


def mix_and_train(recipe: DataRecipe, run: Runner) -> tuple[Ref, Ref]:
    """The mixture, and the checkpoint or adapter trained on it."""
    data = mixture(recipe, run)
    return data, trained(recipe, data, run)
