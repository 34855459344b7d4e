"""What is computed again when one thing changes: counted at a real Prefect server, by its own task run states."""

import shutil
import time
from collections import Counter

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.benchmark import benchmark
from flows.merge_and_evaluate import merge_and_evaluate
from flows.parameters import Bench, MergeAndEvaluate
from tasks.store import Store

pytestmark = pytest.mark.usefixtures("prefect_server")
ROLES = ("helpful", "honest", "harmless")


def request(models, **method):
    recipe = {
        "base": models["base"],
        "experts": [{"name": name, "source": models[name]} for name in ROLES],
        "method": {"name": "r_tsvm"} | method,
    }
    return MergeAndEvaluate.model_validate({"recipe": recipe, "limit": 8})


def run(flow, parameters):
    """Run a flow; gives its result, and how often each task was computed and how often it was Cached, by the API."""
    state = flow(parameters, return_state=True)
    flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        # The server records task runs from events, a moment later; "publish" is the last of every flow.
        for _ in range(300):
            runs = client.read_task_runs(flow_run_filter=flow_run, limit=200)
            done = all(run.state is not None and run.state.is_final() for run in runs)
            if done and any(run.name == "publish" for run in runs):
                break
            time.sleep(0.1)
    made = Counter(run.name.split()[0] for run in runs if run.state.name == "Completed")
    cached = Counter(run.name.split()[0] for run in runs if run.state.name == "Cached")
    assert made.total() + cached.total() == len(runs)
    return state.result(), made, cached


EVERYTHING = {"resolve": 4, "decompose": 3, "measure": 3, "merge": 1, "evaluate": 5, "compare": 1, "report": 1}
SHOWN = {"publish": 1}


def test_nothing_is_computed_twice(models):
    first, made, cached = run(merge_and_evaluate, request(models))
    assert (made, cached) == (EVERYTHING | SHOWN, {})
    second, made, cached = run(merge_and_evaluate, request(models))
    assert (made, cached) == (SHOWN, EVERYTHING)
    assert first == second


def test_a_new_scale_decomposes_nothing(models):
    run(merge_and_evaluate, request(models))
    _, made, cached = run(merge_and_evaluate, request(models, scale=0.5))
    assert made == {"merge": 1, "evaluate": 1, "report": 1} | SHOWN
    assert (cached["decompose"], cached["measure"], cached["evaluate"]) == (3, 3, 4)


def test_a_new_expert_costs_its_own_task_vectors_the_merge_and_its_scores(models, expert_of, tmp_path):
    run(merge_and_evaluate, request(models))
    changed = models | {"honest": str(expert_of(tmp_path / "models" / "other", 9))}
    _, made, cached = run(merge_and_evaluate, request(changed))
    ours = {"resolve": 1, "decompose": 1, "measure": 1, "merge": 1, "evaluate": 2, "compare": 1, "report": 1}
    assert made == ours | SHOWN
    assert cached["decompose"] == 2


def test_the_same_expert_at_another_path_costs_a_report_that_names_it(models, tmp_path):
    run(merge_and_evaluate, request(models))
    shutil.copytree(models["honest"], tmp_path / "elsewhere")
    _, made, _ = run(merge_and_evaluate, request(models | {"honest": str(tmp_path / "elsewhere")}))
    assert made == {"report": 1} | SHOWN


def test_batch_size_does_not_change_the_scores_identity(models):
    first = request(models)
    run(merge_and_evaluate, first)
    other = first.model_copy(update={"execution": type(first.execution)(batch_size=3)})
    assert run(merge_and_evaluate, other)[1] == SHOWN


def test_the_benchmark_chooses_on_validation_and_reports_on_test(models):
    bench = Bench.model_validate(
        {
            "title": "A small comparison",
            "base": models["base"],
            "experts": [{"name": name, "source": models[name]} for name in ROLES],
            "methods": [{"name": "linear"}, {"name": "tsvm"}],
            "scales": [0.5, 1.0],
            "limit": 8,
        }
    )
    result, made, _ = run(benchmark, bench)
    # Validation: three experts, one linear, two scales of tsvm. Test: base, three experts, two merges.
    assert made["evaluate"] == 6 + 6
    store = Store.default()
    ref = store.lookup(result["report"])
    scores = [store.manifest(store.lookup(parent)) for parent in store.manifest(ref).parents if "scores/" in parent]
    assert {manifest.identity["settings"]["split"] for manifest in scores} == {"validation", "test"}
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(limit=200)
    assert {"leaderboard", "leaderboard-table"} <= {artifact.key for artifact in shown}
    assert any("A small comparison" in str(artifact.data) for artifact in shown)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "r_tsmv"}, "r_tsmv"),
        ({"name": "r_tsvm", "sacle": 1}, "sacle"),
        ({"name": "tsvm", "scale": -1}, "scale"),
    ],
)
def test_a_wrong_entry_is_refused_by_the_flow_with_the_fields_name(models, method, message):
    from prefect.exceptions import ParameterTypeError

    plain = request(models).model_dump()
    plain["recipe"]["method"] = method
    with pytest.raises(ParameterTypeError, match=message):
        merge_and_evaluate(plain)
