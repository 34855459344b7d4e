"""What parents ask of GPU workers is the very artifact that they lack; and how a command line writes requests."""

import json

import pytest

from flows.commands.trigger import merged, set_at
from flows.elsewhere import merge_request
from flows.evaluate import Evaluate
from flows.parameters import Bench, Decompose, Merge, MergeAndEvaluate
from flows.pipeline import Exam, Kitchen, pin, pin_recipe
from flows.pools import OnPools, runner
from merging_core.errors import CheckpointError, RecipeError
from merging_core.recipe import Recipe
from tasks.align import Family
from tasks.evaluate import Execution
from tasks.orchestration import AsPrefectTasks
from tasks.plan import Planner
from tasks.recipes import parse_recipe
from tasks.sources import resolve
from tasks.steps import Direct
from tasks.store import Store
from tests.conftest import ROLES


class Recorder(Planner):
    """Keeps the steps that it is asked for, and computes none."""

    def __init__(self, store):
        super().__init__(store)
        self.steps = []

    def build(self, name, title, steps):
        self.steps += steps
        return super().build(name, title, steps)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def recipe_of(family, method):
    experts = {"helpful": str(family["helpful"]), "honest": {"source": str(family["honest"]), "weight": 0.5}}
    return parse_recipe({"base": str(family["base"]), "experts": experts, "method": method, "seed": 3})


def asked(step, deployment, shape):
    """The request behind a step, as the other machine reads it from JSON."""
    assert step.elsewhere.deployment == deployment
    return shape.model_validate(json.loads(json.dumps(step.elsewhere.parameters))["request"])


@pytest.mark.parametrize("method", [{"name": "ties", "density": 0.3}, {"name": "r_tsvm", "gamma": 0.5}])
def test_a_request_for_a_merge_names_the_same_merge(family, store, method):
    recipe, recorder = recipe_of(family, method), Recorder(store)
    Kitchen(recorder, *pin_recipe(recipe, recorder)).merge(recipe)
    merge = next(step for step in recorder.steps if step.kind == "merged")
    theirs, planner = asked(merge, "merge/merge", Merge).recipe.recipe(), Planner(store)
    assert Kitchen(planner, *pin_recipe(theirs, planner)).merge(theirs) == merge.ref


def test_a_request_for_task_vectors_names_the_same_ones(family, store):
    recipe, recorder = recipe_of(family, {"name": "r_tsvm"}), Recorder(store)
    Kitchen(recorder, *pin_recipe(recipe, recorder)).merge(recipe)
    wanted = [step for step in recorder.steps if step.kind in ("task-vectors", "statistics")]
    theirs, planner = asked(wanted[0], "decompose/decompose", Decompose).recipe.recipe(), Planner(store)
    prepared = Kitchen(planner, *pin_recipe(theirs, planner)).prepare(theirs)
    assert sorted(prepared) == sorted(step.ref for step in wanted)
    linear = recipe_of(family, {"name": "linear"})
    kitchen = Kitchen(planner, *pin_recipe(linear, planner))
    with pytest.raises(RecipeError, match="needs no task vectors"):
        kitchen.prepare(linear)


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_decompose_makes_what_a_merge_needs_and_nothing_else(family, store, monkeypatch):
    from flows.decompose import decompose

    monkeypatch.setenv("TRIPOISE_STORE", str(store.root))
    recipe, recorder = recipe_of(family, {"name": "r_tsvm"}), Recorder(store)
    Kitchen(recorder, *pin_recipe(recipe, recorder)).merge(recipe)
    made = decompose(asked(recorder.steps[0], "decompose/decompose", Decompose))
    wanted = [one for one in recorder.planned if one.ref.kind != "merged"]
    assert sorted(made["made"]) == sorted(f"{one.ref.kind}/{one.ref.digest}" for one in wanted)
    run = Direct(store)
    Kitchen(run, *pin_recipe(recipe, run)).merge(recipe)
    assert [built.ref.kind for built in run.built if not built.reused] == ["merged"]


def test_a_time_limit_goes_along_with_every_request_and_names_the_same_artifacts(family, store):
    recipe = recipe_of(family, {"name": "r_tsvm"})
    plain, limited = Recorder(store), Recorder(store)
    merged = Kitchen(plain, *pin_recipe(recipe, plain)).merge(recipe)
    assert Kitchen(limited, *pin_recipe(recipe, limited), timeout_minutes=7.5).merge(recipe) == merged
    assert {step.timeout_minutes for step in limited.steps} == {7.5}
    assert {step.elsewhere.parameters["request"]["timeout_minutes"] for step in limited.steps} == {7.5}
    request = MergeAndEvaluate.model_validate(
        {"recipe": {"base": "b", "experts": [{"name": "a", "source": "s"}]}, "execution": {"timeout_minutes": 7.5}}
    )
    base, recorder = resolve(str(family["base"]), store).ref, Recorder(store)
    Exam.of(request, recorder).scores(base, "base")
    assert {step.timeout_minutes for step in recorder.steps} == {7.5}
    assert asked(recorder.steps[0], "evaluate/evaluate", Evaluate).execution.timeout_minutes == 7.5


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan")])
def test_a_time_limit_that_is_none_is_refused(minutes):
    with pytest.raises(RecipeError, match="timeout_minutes must be a finite number > 0"):
        Execution(timeout_minutes=minutes)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_request_for_scores_names_the_same_scores(family, store, limit):
    request = MergeAndEvaluate.model_validate(
        {"recipe": {"base": "b", "experts": [{"name": "a", "source": "s"}]}, "suite": "3h-mini", "limit": 5}
    )
    base = resolve(str(family["base"]), store).ref
    recorder = Recorder(store)
    wanted = Exam.of(request, recorder, world_seed=2).scores(base, "base", "validation", limit)
    assert len(wanted) == 6
    theirs, planner = asked(recorder.steps[0], "evaluate/evaluate", Evaluate), Planner(store)
    assert theirs.limit == (limit or 5)
    model = pin({"model": theirs.model}, planner)["model"]
    assert model == base
    assert Exam.of(theirs, planner, theirs.world_seed).scores(model, "base", theirs.split) == wanted


def test_a_benchmark_asks_for_the_world_of_each_seed(family, store):
    from flows.benchmark import compare_methods

    bench = Bench.model_validate(
        {
            "base": str(family["base"]),
            "experts": [{"name": name, "source": str(family[name])} for name in ROLES[1:]],
            "methods": [{"name": "linear"}],
            "seeds": [7],
        }
    )
    recorder = Recorder(store)
    compare_methods(bench, recorder)
    requests = [step.elsewhere.parameters["request"] for step in recorder.steps if step.kind == "scores"]
    assert requests
    assert {one["world_seed"] for one in requests} == {7}


def test_a_hub_repository_is_asked_for_by_commit(store):
    place = f"hf://org/model@{'c' * 40}"
    base = store.build("checkpoint", {"files": {}}, lambda _: {"origin": place}).ref
    expert = store.build("checkpoint", {"files": {"a": "b"}}, lambda _: {"origin": "/models/expert"}).ref
    recipe = parse_recipe({"base": "hf://org/model@main", "experts": {"a": "/models/expert"}, "method": "linear"})
    assert isinstance(recipe, Recipe)
    sent = merge_request(recipe, Family(base, {"a": expert}), "cpu", store).parameters["request"]["recipe"]
    assert (sent["base"], sent["experts"][0]["source"]) == (place, "/models/expert")


def test_steps_go_elsewhere_only_where_the_environment_says_so(store, monkeypatch):
    monkeypatch.delenv("TRIPOISE_GPU_STEPS", raising=False)
    assert type(runner(store)) is AsPrefectTasks
    monkeypatch.setenv("TRIPOISE_GPU_STEPS", "deployments")
    assert type(runner(store)) is OnPools


def test_a_model_of_the_store_is_a_source_by_a_part_of_its_digest(family, store, tmp_path):
    base = resolve(str(family["base"]), store).ref
    for text in (base.digest, base.digest[:12]):
        assert resolve(f"store://checkpoint/{text}", store).ref == base
    [vectors] = Direct(store).build("x", "x", [vectors_step(family, store)])
    with pytest.raises(RecipeError, match="task-vectors is no model"):
        resolve(f"store://task-vectors/{vectors.digest}", store)
    with pytest.raises(RecipeError, match="no artifact matches"):
        resolve("store://merged/0123", store)
    with pytest.raises(CheckpointError, match="there is no mirror"):
        resolve(f"store://merged/{'0' * 64}", store)


def vectors_step(family, store):
    recorder = Recorder(store)
    recipe = recipe_of(family, {"name": "tsvm"})
    Kitchen(recorder, *pin_recipe(recipe, recorder)).merge(recipe)
    return next(step for step in recorder.steps if step.kind == "task-vectors")


def test_parameters_of_a_file_are_merged_into_those_of_the_deployment_at_every_depth():
    preset = {"request": {"recipe": {"base": "b", "method": {"name": "ties"}, "experts": [1, 2]}, "suite": "3h-mini"}}
    given = {"request": {"recipe": {"method": {"density": 0.3}, "experts": [3]}, "limit": 4}}
    assert merged(preset, given) == {
        "request": {
            "recipe": {"base": "b", "method": {"name": "ties", "density": 0.3}, "experts": [3]},
            "suite": "3h-mini",
            "limit": 4,
        }
    }
    assert merged(preset, {"request": {"suite": None}})["request"] == preset["request"] | {"suite": None}


def test_a_parameter_is_set_by_its_path_and_its_value_is_yaml():
    parameters = {"request": {"recipe": {"experts": [{"name": "a"}, {"name": "b"}]}, "limit": None}}
    set_at(parameters, "request.limit=8")
    set_at(parameters, "request.recipe.experts.1.weight=0.5")
    set_at(parameters, "request.recipe.method.name=tsvm")
    set_at(parameters, "request.title=a=b")
    assert parameters == {
        "request": {
            "recipe": {"experts": [{"name": "a"}, {"name": "b", "weight": 0.5}], "method": {"name": "tsvm"}},
            "limit": 8,
            "title": "a=b",
        }
    }
    for wrong in (
        "request",
        "request.limit.x=1",
        "request.recipe.experts.2.name=c",
        "=1",
        "request.limit=[",
        "request.=1",
    ):
        with pytest.raises(RecipeError, match=r"^--param"):
            set_at(parameters, wrong)
