"""The flow ``evaluate``: one model, scored on a suite."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows.evaluation import Evaluation
from flows.pipeline import Exam, pin
from flows.pools import gpu_slot
from flows.shown import completed, show_scores
from tasks.orchestration import TASK_RUNNER, AsPrefectTasks
from tasks.recipes import Source
from tasks.store import Store
from tasks.suite import Split


class Evaluate(Evaluation):
    """Score one model on a suite."""

    model: Source = Field(
        title="Model",
        description="Local folder, hf://org/name@revision, s3://bucket/prefix, or store://kind/digest for what a run "
        "has made.",
    )
    split: Split = Field(
        default="test", title="Split", description="Validation, on which choices are made, or test, which is reported."
    )
    world_seed: int | None = Field(
        default=None,
        title="World seed",
        description="Of a suite on a generated world, such as 3h-mini. Left out: the suite's own.",
        ge=0,
    )


def _run_name() -> str:
    request = Evaluate.model_validate(flow_run.parameters["request"])
    name = request.model.rstrip("/").rpartition("/")[2]
    return f"{name[:12] if request.model.startswith('store://') else name} · {request.suite} · {request.split}"


@flow(name="evaluate", flow_run_name=_run_name, task_runner=TASK_RUNNER)
def evaluate(request: Evaluate) -> dict[str, Any]:
    """You get the scores of one model, an artifact of the store for each benchmark."""
    run, name = AsPrefectTasks(Store.default()), request.model
    exam = Exam.of(request, run, world_seed=request.world_seed)
    model = pin({name: name}, run)[name]
    with gpu_slot():
        scores = exam.scores(model, name, request.split)
    show_scores(model, scores, exam.suite, run.store)
    return completed(model=f"{model.kind}/{model.digest}", scores=[f"{ref.kind}/{ref.digest}" for ref in scores])
