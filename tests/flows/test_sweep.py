"""Sweeps over real merges and scores: what is tried, resumed, chosen, reported and refused."""

import json
import os
import signal
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml

from flows.sweep import plan_search, search_recipes, sweep
from flows.sweep_parameters import Sweep, load_sweep
from merging_core.errors import RecipeError
from tasks.plan import Planner
from tasks.reporting import read_report
from tasks.steps import Direct
from tasks.store import Store
from tasks.sweep.choice import choose, pareto_set
from tasks.sweep.files import read_trials

ROLES = ("helpful", "honest", "harmless")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/{name}-validation.jsonl, test: {folder}/{name}-test.jsonl}}}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [a, b, c, d]
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_documents(folder, split, shift=0):
    """Twelve questions for each H: a few words, and one of four words as the right answer."""
    for k, name in enumerate(ROLES):
        texts = [f"{'efghijkl'[i % 8]} {'abcdefghijkl'[(i * 5 + k) % 12]}" for i in range(12)]
        lines = [json.dumps({"text": text, "gold": (i + k * i + shift) % 4}) for i, text in enumerate(texts)]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def suite(tmp_path):
    """A suite of one multiple-choice task for each H on local files; scores of tiny models differ on it."""
    folder = tmp_path / "suite"
    folder.mkdir()
    for split in ("validation", "test"):
        write_documents(folder, split)
    for name in ROLES:
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    benchmarks = [{"task": name, "dimension": name, "metric": "acc"} for name in ROLES]
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "title": "tiny", "tasks": "suite", "benchmarks": benchmarks}))
    return path


@pytest.fixture
def sweep_file(tmp_path, family, suite):
    def write(**changes):
        plain = {
            "title": "Tiny sweep",
            "suite": str(suite),
            "recipe": {
                "base": str(family["base"]),
                "experts": {name: str(family[name]) for name in ROLES},
                "method": "task_arithmetic",
            },
            "search": {
                "method.name": ["task_arithmetic", "ties"],
                "method.scale": {"low": 0.5, "high": 4.0, "step": 0.5},
                "experts.honest.weight": [0.5, 1.0, 3.0],
            },
            "sampler": "random",
            "trials": 6,
            "seed": 1,
            "keep": 2,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(plain | changes))
        return path

    return write


def carry_out(path, store):
    """Run a sweep without a server; gives its report's folder, and the artifacts that were made now."""
    run = Direct(store)
    report = search_recipes(load_sweep(path), run)
    return store.folder(report), [built.ref for built in run.built if not built.reused]


def test_a_sweep_tries_tests_the_chosen_and_reports_all(sweep_file, tmp_path):
    store = Store(tmp_path / "store")
    folder, made = carry_out(sweep_file(), store)
    trials = read_trials(folder)["trials"]
    assert [trial["trial"] for trial in trials] == list(range(6))
    points = {one["trial"]: tuple(one[name] for name in ROLES) for one in trials if one["repeats"] is None}
    assert len(set(points.values())) > 1, "all trials are alike: the test shows nothing"
    assert [one["trial"] for one in trials if one["pareto"]] == pareto_set(points)
    chosen = choose(points, 2)
    assert {one["trial"]: one["chosen"] for one in trials if one["chosen"]} == chosen
    named = {f"{trials[number]['method']} (trial {number})" for number in chosen}
    assert {row["model"] for row in read_report(folder).rows} == {"base", *ROLES, *named}

    # On test: base, experts and the chosen, nothing else.
    splits = Counter(store.manifest(ref).identity["settings"]["split"] for ref in made if ref.kind == "scores")
    assert splits == {"test": 3 * (4 + len(chosen)), "validation": 3 * (4 + len(points))}
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [json.loads(row.pop("settings")) for row in table] == [one.pop("settings") for one in trials]
    assert table == trials
    page = (folder / "pareto.html").read_text()
    assert all(f"trial {number}" in page for number in range(6))
    assert carry_out(sweep_file(), store) == (folder, [])


# Some of its trials are pruned, some are not.
PRUNED = {
    "sampler": "tpe",
    "trials": 6,
    "search": {"method.scale": {"low": 0.5, "high": 20.0, "step": 0.5}, "experts.honest.weight": [-3.0, 0.5, 3.0]},
    "pruning": {"limit": 6, "margin": 0.0},
}


def test_a_sweep_that_was_killed_goes_on_and_computes_nothing_twice(sweep_file, tmp_path):
    path = sweep_file(**PRUNED)
    whole = Store(tmp_path / "whole")
    folder, all_made = carry_out(path, whole)
    assert {trial["state"] for trial in read_trials(folder)["trials"]} == {"complete", "pruned"}
    for kill_at in (17, 30):
        store = Store(tmp_path / f"killed{kill_at}")
        child = os.fork()
        if not child:
            try:
                kill_in_the_middle(path, store, kill_at)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        before = set(store.refs())
        again, made = carry_out(path, store)
        assert len(before) >= kill_at - 2
        assert not before & set(made)
        assert before | set(made) == set(all_made)
        assert again.name == folder.name
        assert (again / "trials.json").read_bytes() == (folder / "trials.json").read_bytes()


def kill_in_the_middle(path, store, kill_at):
    """Run a sweep in this process and kill it while an artifact is being made."""
    make, count = Store._make, 0

    def killing(self, ref, *rest):
        nonlocal count
        count += 1
        if count == kill_at:
            (self.root / ref.kind / f".{ref.digest}.partial").mkdir(parents=True)
            os.kill(os.getpid(), signal.SIGKILL)
        make(self, ref, *rest)

    Store._make = killing
    carry_out(path, store)


def test_the_choice_does_not_depend_on_test_data(sweep_file, suite, tmp_path):
    store = Store(tmp_path / "store")
    folder, _ = carry_out(sweep_file(), store)
    before, scores = read_trials(folder)["trials"], read_report(folder).rows
    write_documents(tmp_path / "suite", "test", shift=1)
    folder, made = carry_out(sweep_file(), store)
    assert read_trials(folder)["trials"] == before
    assert read_report(folder).rows != scores
    assert {ref.kind for ref in made} == {"scores", "report"}
    write_documents(tmp_path / "suite", "validation", shift=1)
    folder, _ = carry_out(sweep_file(), store)
    assert read_trials(folder)["trials"] != before


def test_more_trials_and_an_equal_grid_point_cost_only_what_is_new(sweep_file, tmp_path):
    store = Store(tmp_path / "store")
    search = {"method.scale": [1.0, 2.0]}
    carry_out(sweep_file(sampler="grid", search=search), store)
    _, made = carry_out(sweep_file(sampler="grid", search={"method.scale": [1.0, 2.0, 3.0]}), store)
    assert Counter(ref.kind for ref in made)["merged"] == 1
    _, made = carry_out(sweep_file(sampler="grid", search={"method.scale": {"low": 1, "high": 3, "step": 1}}), store)
    assert [ref.kind for ref in made] == ["report"]


TESTED = "which trials are tested, and the report"


@pytest.mark.parametrize(
    ("changes", "num_trials", "unknown"),
    [
        ({"sampler": "grid", "search": {"method.scale": [1.0, 2.0, 3.0]}}, 3, [TESTED]),
        (PRUNED, 6, ["which trials are pruned, and the whole validation of the others", TESTED]),
        (
            {"sampler": "tpe", "trials": 11},
            10,
            ["the trials from 10 on, proposed by the scores of those before", TESTED],
        ),
    ],
)
def test_a_plan_names_what_no_score_decides_and_the_run_makes_it(sweep_file, tmp_path, changes, num_trials, unknown):
    store, path = Store(tmp_path / "store"), sweep_file(**changes)
    before = Planner(store)
    plan_search(load_sweep(path), before)
    assert {ref.kind for ref in store.refs()} == {"checkpoint"}
    assert not any(one.reused for one in before.planned)
    assert before.unknown == unknown
    folder, made = carry_out(path, store)
    planned = [one.ref for one in before.planned]
    assert set(planned) < set(made)
    # Nine scores on each split for the experts, three for the base, and as many for every distinct trial.
    trials = read_trials(folder)["trials"][:num_trials]
    models = {trial["model"] for trial in trials}
    assert Counter(ref.kind for ref in planned) == {
        "merged": len(models),
        "scores": 2 * 12 + 3 * len(models),
        "interference": 1,
    }
    assert {f"merged/{ref.digest}" for ref in planned if ref.kind == "merged"} == models
    after = Planner(store)
    plan_search(load_sweep(path), after)
    assert [one.ref for one in after.planned] == planned
    assert all(one.reused for one in after.planned)


def test_the_command_plan_takes_a_sweep_file(sweep_file, tripoise):
    path = sweep_file(sampler="grid", search={"method.scale": [1.0, 2.0]})
    planned = json.loads(tripoise("plan", path, "--json")[1])
    assert (planned["compute"], planned["reuse"], planned["unknown"]) == (24 + 2 * 4 + 1, 0, [TESTED])
    assert tripoise("plan", path)[1].endswith(f"\n33 to compute, 0 to reuse\nnot known yet: {TESTED}\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampeler": "grid"}, "sweep sweep.yaml: has no entry 'sampeler'. Nearest: 'sampler'"),
        ({"sampler": "nsga"}, "'tpe', 'random' or 'grid', got 'nsga'"),
        ({"search": {"method.scael": [1.0]}}, "has no entry 'method.scael'. Nearest: 'method.scale'"),
        ({"search": {"method.scale": {"low": 1, "hihg": 2}}}, "has no entry 'hihg'. Nearest: 'high'"),
        ({"search": {"method.scale": 1.0}}, "expected a list of values or {low, high}, got 1.0"),
        ({"search": {"method.scale": {"low": -1, "high": 2}}}, "search method.scale: .*greater than or equal to 0"),
        ({"search": {}}, "at least 1"),
        ({"sampler": "grid", "trials": 4}, "the grid has 48 points, and trials is 4"),
        ({"pruning": {"limit": 1}}, "limit must be a finite number >= 2|greater than or equal to 2"),
        ({"pruning": {"limit": 8}, "limit": 8}, "pruning: limit must be below the sweep's, got 8 and 8"),
        ({"keep": 0}, "keep: .*greater than or equal to 1"),
    ],
)
def test_a_sweep_file_that_is_wrong_is_refused_before_anything_runs(sweep_file, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_sweep(sweep_file(**changes))


def test_the_shipped_sweep_can_be_read():
    from pathlib import Path

    shipped = load_sweep(Path(__file__).parents[2] / "recipes" / "mini-3h-sweep.yaml")
    assert set(shipped.space().dials) == {"task_arithmetic", "ties", "tsvm"}
    assert Sweep.model_validate(shipped.model_dump()) == shipped


def test_every_field_of_the_run_form_has_a_title_and_a_text():
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(sweep).model_dump_for_openapi()
    for name in ("Sweep", "Searched", "Pruning"):
        for field, shape in schema["definitions"][name]["properties"].items():
            assert shape.get("title") or "$ref" in shape, f"{name}.{field}"
            assert shape.get("description"), f"{name}.{field}"


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_publishes_plan_and_report_and_the_second_run_reuses_all(sweep_file, tmp_path, monkeypatch):
    from prefect.artifacts import Artifact

    monkeypatch.setenv("TRIPOISE_STORE", str(tmp_path / "store"))
    path = sweep_file(sampler="random", trials=2, search={"method.scale": {"low": 1.0, "high": 2.0}})
    first, told = sweep(load_sweep(path)), Artifact.get("plan").description
    assert told == f"33 to compute, 0 to reuse. Not known yet: {TESTED}"
    second, told = sweep(load_sweep(path)), Artifact.get("plan").description
    assert told == f"0 to compute, 33 to reuse. Not known yet: {TESTED}"
    assert first["report"] == second["report"]
    assert first["made"] > 0
    assert second["made"] == 0
