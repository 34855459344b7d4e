"""Judges of a run: one for each question, asked about every model, and a second one told beside the first."""

import json

import pytest
import yaml

from flows.benchmark import compare_methods
from flows.evaluation import load_judges
from flows.merge_and_evaluate import merge_and_score
from flows.parameters import Bench, MergeAndEvaluate
from merging_core.errors import RecipeError
from tasks.plan import Planner
from tasks.reporting import read_report
from tasks.scores import read_record
from tasks.steps import Direct
from tasks.store import Store
from tests.conftest import ROLES
from tests.tasks.judges.stand_in import NO, YES, StandIn

TASK = {
    "dataset_path": "org/data",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "label",
    "num_fewshot": 0,
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 3},
    "metadata": {"version": 1.0},
}
NUM_PROMPTS = 12
MODELS = ("base", *ROLES[1:], "linear")


@pytest.fixture
def asked(tmp_path):
    """A suite that asks a judge about refusal, abstention and harm, and local files for it."""
    benchmarks = {"declines": ("helpful", "refusal"), "unsure": ("honest", "abstention"), "harms": ("harmless", "harm")}
    entries = []
    for name, (dimension, question) in benchmarks.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(TASK | {"task": name}))
        entries.append({"task": name, "dimension": dimension, "question": question, "data": "prompts"})
    suite = {"name": "judged", "title": "Judged", "validation_share": 0.5, "benchmarks": entries}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    rows = [{"prompt": f"a {word} b", "label": "x"} for word in "abcdefghijkl"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "prompts" / "test.jsonl").write_text(text)
    return {"suite": str(tmp_path / "suite.yaml"), "data_dir": str(tmp_path / "data")}


@pytest.fixture
def run(tmp_path):
    return Direct(Store(tmp_path / "store"))


def merge_request(family, asked, **changes):
    experts = [{"name": name, "source": str(family[name])} for name in ROLES[1:]]
    recipe = {"base": str(family["base"]), "experts": experts, "method": {"name": "linear"}}
    return MergeAndEvaluate.model_validate({"recipe": recipe, **asked, **changes})


def bench_request(family, asked, **changes):
    experts = [{"name": name, "source": str(family[name])} for name in ROLES[1:]]
    plain = {"base": str(family["base"]), "experts": experts, "methods": [{"name": "linear"}], "scales": [1.0]}
    return Bench.model_validate({**plain, **asked, **changes})


def always(reply):
    return StandIn(lambda material, before: (200, {}, reply))


def endpoint(server, model="judge"):
    return {"name": "endpoint", "url": server.url, "model": model}


def page(report, run):
    return (run.store.folder(report) / "report.html").read_text()


def test_a_question_without_a_judge_is_refused_before_anything_is_computed(family, asked, run):
    with pytest.raises(RecipeError, match=r"harms asks about harm.*`judges: \{harm: \{name: \.\.\.\}\}`"):
        merge_and_score(merge_request(family, asked), run)
    assert run.store.refs() == []


def test_every_model_is_judged_by_the_judge_that_is_named(family, asked, run):
    with always(YES) as harmful:
        _, report = merge_and_score(merge_request(family, asked, judges={"harm": endpoint(harmful)}), run)
    judged = [read_record(ref, run.store) for ref in run.store.refs("scores")]
    harms = [one for one in judged if one["metric"] == "harm"]
    assert [(one["judge"]["name"], one["value"]) for one in harms] == [("endpoint", 1.0)] * len(MODELS)
    rows = read_report(run.store.folder(report)).rows
    assert {row["model"] for row in rows} == set(MODELS)
    assert "Agreement" not in page(report, run)


def test_a_second_judge_is_asked_about_the_same_responses_and_only_their_agreement_is_told(family, asked, run):
    with always(NO) as first, always(YES) as second:
        alone = {"judges": {"harm": endpoint(first)}}
        _, plain = merge_and_score(merge_request(family, asked, **alone), run)
        generations = len(run.store.refs("generations"))
        both = alone | {"second_judges": {"harm": endpoint(second, "another"), "refusal": endpoint(second)}}
        _, report = merge_and_score(merge_request(family, asked, **both), run)
        told = len(second.requests)
        merge_and_score(merge_request(family, asked, **both), run)
        assert len(second.requests) == told > 0
    assert len(run.store.refs("generations")) == generations
    rows = [read_report(run.store.folder(ref)).rows for ref in (plain, report)]
    assert rows[0] == rows[1]
    inputs = json.loads((run.store.folder(report) / "report.json").read_text())["agreement"]
    assert [(one["model"], one["task"], one["judges"]) for one in inputs] == [
        (model, task, judges)
        for model in MODELS
        for task, judges in (("declines", "rule, endpoint"), ("harms", "endpoint, endpoint"))
    ]
    harms = [one for one in inputs if one["task"] == "harms"]
    assert all(one["share"] == 0 and one["n"] == one["only_second"] > 0 for one in harms)
    assert "rule, endpoint" in page(report, run)


def test_in_a_benchmark_second_judges_read_the_test_split_only(family, asked, run):
    with always(NO) as first, always(YES) as second:
        request = bench_request(
            family, asked, judges={"harm": endpoint(first)}, second_judges={"harm": endpoint(second)}
        )
        compare_methods(request, run)
        materials = [
            {json.loads(body["messages"][-1]["content"])["prompt"] for body in one.requests} for one in (first, second)
        ]
        planner = Planner(run.store)
        compare_methods(request, planner)
    assert materials[1] < materials[0]
    assert len(materials[0]) == NUM_PROMPTS
    assert all(one.reused for one in planner.planned)


def test_the_same_judge_twice_is_refused(family, asked):
    with pytest.raises(ValueError, match="refusal is decided by the same judge"):
        merge_request(family, asked, second_judges={"refusal": {"name": "rule"}})


def test_a_judge_that_cannot_decide_a_question_is_refused_by_the_form(family, asked):
    with pytest.raises(ValueError, match=r"(?s)judges\.harm.*does not match any of the expected tags"):
        merge_request(family, asked, judges={"harm": {"name": "rule"}})


def test_the_command_line_reads_judges_from_a_file(family, asked, tmp_path, tripoise):
    judges = tmp_path / "judges.yaml"
    common = ("evaluate", family["base"], "--suite", asked["suite"], "--data-dir", asked["data_dir"])
    with always(YES) as server:
        judges.write_text(yaml.safe_dump({"harm": endpoint(server)}))
        code, out, err = tripoise(*common, "--judges", judges, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    values = {one["task"]: one["value"] for one in json.loads(out)["benchmarks"]}
    assert values["harms"] == 1.0
    code, _, err = tripoise(*common, "--out", tmp_path / "none")
    assert code == 1
    assert "no judge for 1 of its benchmarks" in err
    assert not (tmp_path / "none").exists()


def test_a_misspelt_question_gets_the_nearest(tmp_path):
    (tmp_path / "judges.yaml").write_text("refusall: {name: rule}")
    with pytest.raises(RecipeError, match=r"refusall.*refusal"):
        load_judges(tmp_path / "judges.yaml")


def test_a_merge_without_the_chat_template_of_an_expert_is_flagged(family, asked, run):
    config = family["helpful"] / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}))
    with always(NO) as server:
        _, report = merge_and_score(merge_request(family, asked, judges={"harm": endpoint(server)}), run)
    assert "linear (chat template lost)" in read_report(run.store.folder(report)).markdown
