"""The evaluate step: put the benchmarks of a suite to a model, one artifact for each.

A benchmark with a question gives ``generations``, which a judge reads in a second stage; any other gives ``scores``.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from annotated_types import Ge, Gt

from merging_core.errors import NumericalError, RecipeError
from merging_core.settings import STRICT, check_bounds, check_choices
from tasks.backends import Endpoint, endpoint_model, vllm_model
from tasks.generations import Generation, write_generations
from tasks.harness import Reply, ask, transformers_model
from tasks.scores import Asked, Sample, Scored, write_scores
from tasks.steps import Step
from tasks.store import Ref, Store
from tasks.suite import Benchmark, Split, Suite

# Raise it whenever the same model gets other scores by a change of ours.
EVALUATE_VERSION: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """What is asked of a model; part of the scores' identity."""

    __pydantic_config__: ClassVar = STRICT
    split: Split = "test"
    """Validation, on which choices are made, or test, which is reported."""
    limit: int | None = None
    """Evaluate only so many samples of each benchmark, >= 1: a fixed random choice, the same for every model. The
    scores are marked as partial."""
    apply_chat_template: bool = False
    """Wrap prompts in the model's chat template, in benchmarks that leave it open."""

    def __post_init__(self) -> None:
        check_choices(self, "evaluate")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"evaluate: limit must be a whole number >= 1 or left out, got {self.limit!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How the work is done; of it only the backend tells scores apart."""

    __pydantic_config__: ClassVar = STRICT
    device: str = "cpu"
    """Torch device, such as cpu or cuda:0. Of several, such as cuda:0,cuda:1, all merge and the first evaluates."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Requests in one forward pass, >= 1."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the model here: transformers, or vLLM where installed; scores by the two are kept apart."""
    timeout_minutes: Annotated[float, Gt(0)] | None = None
    """Minutes after which one merge, or one model's evaluation, is stopped, > 0; left out: never. What is complete by
    then is kept for the next run."""

    def __post_init__(self) -> None:
        check_bounds(self, "evaluate")
        check_choices(self, "evaluate")
        if self.timeout_minutes is not None and not 0 < self.timeout_minutes < math.inf:
            raise RecipeError(
                f"evaluate: timeout_minutes must be a finite number > 0 or left out, got {self.timeout_minutes!r}."
            )


def evaluate_steps(
    model: Ref,
    name: str,
    suite: Suite,
    settings: EvaluateSettings,
    store: Store,
    execution: Execution,
    endpoint: Endpoint | None = None,
) -> list[Step]:
    """One step for each benchmark of a suite; the model is loaded once, and only if a benchmark is missing.

    Args:
        model: a checkpoint or a merged model; for an endpoint its tokenizer, of kind ``tokenizer``.
        name: how titles call it.
        suite: what is run.
        settings: what is asked.
        store: where the model lies and the scores go.
        execution: device, batch size and backend.
        endpoint: where the model is served; default: it is run here.

    Returns:
        In the suite's order: kind ``generations`` for a benchmark with a question, else ``scores``.

    Raises:
        RecipeError: if a task file or a local file of a benchmark is missing; or if both vLLM and an endpoint are
            to run the model.
    """
    served = _served(execution, endpoint)
    loaded = _Model(model, store, execution, endpoint)
    steps = []
    for benchmark in suite.benchmarks:
        identity = {
            "version": EVALUATE_VERSION,
            "lm_eval": version("lm_eval"),
            "model": model.digest,
            "benchmark": suite.benchmark_digest(benchmark, settings.split),
            "settings": _settings(benchmark, settings),
            **served,
        }

        def make(out: Path, benchmark: Benchmark = benchmark) -> dict[str, Any]:
            return {"model": name, "suite": suite.name, **_write(loaded.lm, suite, benchmark, settings, out)}

        kind = "generations" if benchmark.question else "scores"
        title = f"evaluate {name} on {benchmark.task} ({settings.split})"
        # Of several devices the first evaluates.
        steps.append(Step(kind, title, identity, (model,), make, device=execution.device.partition(",")[0]))
    return steps


def _served(execution: Execution, endpoint: Endpoint | None) -> dict[str, Any]:
    """What else determines the scores where transformers does not run the model here."""
    if endpoint is None:
        return {} if execution.backend == "transformers" else {"backend": execution.backend}
    if execution.backend != "transformers":
        raise RecipeError(f"evaluate: both backend {execution.backend} and an endpoint. Name one of them.")
    return {"endpoint": endpoint.identity()}


def run_benchmark(lm: Any, suite: Suite, benchmark: Benchmark, settings: EvaluateSettings) -> Scored:
    """Run one benchmark and read every sample's metric.

    Args:
        lm: any lm-eval model.
        suite: names the folder of the task files.
        benchmark: which of its benchmarks, one without a question.
        settings: split, limit and chat template.

    Raises:
        RecipeError: as :func:`tasks.harness.ask` does; or if its samples lack the metric.
        NumericalError: if a metric is not finite or leaves [0, 1].
    """
    replies, asked = _ask(lm, suite, benchmark, settings)
    samples = tuple(
        Sample(reply.id, reply.prompt, reply.target, reply.response, _value(reply.metrics, benchmark))
        for reply in replies
    )
    return Scored(asked=asked, metric=benchmark.metric, samples=samples)


def run_generation(
    lm: Any, suite: Suite, benchmark: Benchmark, settings: EvaluateSettings
) -> tuple[list[Generation], Asked]:
    """Collect what a model says to every prompt of a benchmark with a question; nothing of it is read or run.

    Raises:
        RecipeError: as :func:`tasks.harness.ask` does.
    """
    replies, asked = _ask(lm, suite, benchmark, settings)
    found = [
        Generation(reply.id, reply.prompt, reply.target, reply.responses, dict(reply.document)) for reply in replies
    ]
    return found, asked


def load_model(folder: Path, execution: Execution, endpoint: Endpoint | None = None) -> Any:
    """Load a model folder for lm-eval, in its stored dtype, without running code from the folder.

    Args:
        folder: the model; for an endpoint its tokenizer and config.json.
        execution: device, batch size and backend; an endpoint has its own.
        endpoint: where the model is served; default: it is run here.

    Raises:
        RecipeError, CheckpointError: see :func:`tasks.models.load_language_model` and :mod:`tasks.backends`.
    """
    if endpoint is not None:
        return endpoint_model(folder, endpoint)
    if execution.backend == "vllm":
        return vllm_model(folder, execution.device)
    return transformers_model(folder, execution.device, execution.batch_size)


class _Model:
    """A model that is loaded when its first benchmark is missing, from where it lies on the machine that asks it."""

    def __init__(self, model: Ref, store: Store, execution: Execution, endpoint: Endpoint | None) -> None:
        self._model, self._store, self._execution, self._endpoint = model, store, execution, endpoint

    @cached_property
    def lm(self) -> Any:
        return load_model(self._store.folder(self._model), self._execution, self._endpoint)


def _settings(benchmark: Benchmark, settings: EvaluateSettings) -> dict[str, Any]:
    """What counts of the run's settings for one benchmark: a part of its identity."""
    of_run = benchmark.chat_template == "as_run" and settings.apply_chat_template
    return {"split": settings.split, "limit": _limit(benchmark, settings), "apply_chat_template": of_run}


def _limit(benchmark: Benchmark, settings: EvaluateSettings) -> int | None:
    return min((limit for limit in (benchmark.limit, settings.limit) if limit is not None), default=None)


def _ask(lm: Any, suite: Suite, benchmark: Benchmark, settings: EvaluateSettings) -> tuple[list[Reply], Asked]:
    limit = _limit(benchmark, settings)
    return ask(lm, suite, benchmark, settings.split, limit, settings.apply_chat_template)


def _write(lm: Any, suite: Suite, benchmark: Benchmark, settings: EvaluateSettings, out: Path) -> dict[str, Any]:
    """Ask one benchmark, write its artifact, and return what the manifest shows of it."""
    if benchmark.question:
        generations, asked = run_generation(lm, suite, benchmark, settings)
        write_generations(generations, asked, out)
        return {**asdict(asked), "question": benchmark.question, "n": len(generations)}
    scored = run_benchmark(lm, suite, benchmark, settings)
    write_scores(scored, out)
    return scored.record()


def _value(metrics: Mapping[str, Any], benchmark: Benchmark) -> float:
    """The metric of one sample, in [0, 1]."""
    subject = f"benchmark {benchmark.task}"
    if benchmark.metric not in metrics:
        raise RecipeError(f"{subject}: has no metric {benchmark.metric!r}. lm-eval gives: {sorted(metrics)}.")
    try:
        value = float(metrics[benchmark.metric])
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{subject}: {benchmark.metric} of one sample must be a number, got {metrics[benchmark.metric]!r}: it is "
            "made for lm-eval's own aggregation. Name a metric that each sample has."
        ) from error
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise NumericalError(f"{subject}: {benchmark.metric} must be in [0, 1], got {value!r}.")
    return value
