"""Scores as artifacts: what their identity depends on, and what is recorded beside the number."""

import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks.evaluate import EvaluateSettings, Execution, evaluate_steps
from tasks.scores import read_record, read_values
from tasks.sources import resolve
from tasks.steps import Direct
from tasks.store import Store
from tasks.suite import load_suite


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A store with a briefly trained base."""
    store = Store(tmp_path_factory.mktemp("store"))
    return store, resolve("mini3h://honest?budget=smoke", store).ref


@pytest.fixture
def suite(tmp_path):
    """A copy of 3h-mini that may be changed."""
    shipped = load_suite("3h-mini")
    shutil.copytree(shipped.tasks_folder, tmp_path / "suite" / shipped.tasks)
    return replace(shipped, folder=tmp_path / "suite")


def score(shared, suite, execution=None, **settings):
    store, model = shared
    run = Direct(store)
    steps = evaluate_steps(model, "model", suite, EvaluateSettings(**settings), store, execution or Execution())
    refs = run.build("evaluate", "evaluate", steps)
    return refs, [built.reused for built in run.built]


def test_a_score_has_a_standard_error_a_count_and_every_sample(shared, suite):
    store, _ = shared
    refs, _ = score(shared, suite)
    for ref, benchmark in zip(refs, suite.benchmarks, strict=True):
        record = read_record(ref, store)
        samples = pq.read_table(store.folder(ref) / "samples.parquet").to_pylist()
        values = [sample["value"] for sample in samples]
        assert record["task"] == benchmark.task
        assert record["n"] == len(samples) >= 100
        assert record["value"] == pytest.approx(statistics.fmean(values))
        assert record["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
        assert all((sample["response"].strip() == sample["target"]) == sample["value"] for sample in samples)
        assert (record["bos"], record["chat_template"], record["num_fewshot"], record["partial"]) == (
            "yes",
            False,
            0,
            False,
        )


def test_scores_do_not_move_with_the_batch_size(shared, suite, tmp_path):
    store, model = shared
    refs, _ = score(shared, suite, limit=40)
    other = Store(tmp_path / "other")
    shutil.copytree(store.home(model), other.home(model))
    again, _ = score((other, model), suite, Execution(batch_size=7), limit=40)
    assert refs == again
    assert read_values(refs, store) == read_values(again, other)


def test_splits_are_different_documents_and_different_artifacts(shared, suite):
    store, _ = shared
    validation, test = score(shared, suite, split="validation")[0], score(shared, suite, split="test")[0]
    assert not set(validation) & set(test)
    ids = [set(read_values([refs[0]], store)["mini3h_arith"]) for refs in (validation, test)]
    assert not ids[0] & ids[1]


def test_a_limit_is_another_artifact_and_marks_the_scores_as_partial(shared, suite):
    store, _ = shared
    whole, limited = score(shared, suite)[0], score(shared, suite, limit=5)[0]
    assert not set(whole) & set(limited)
    assert {(read_record(ref, store)["partial"], read_record(ref, store)["n"]) for ref in limited} == {(True, 5)}


def test_a_new_benchmark_evaluates_only_itself(shared, suite):
    fewer = replace(suite, benchmarks=suite.benchmarks[1:])
    score(shared, fewer, limit=3)
    assert score(shared, suite, limit=3)[1] == [False] + [True] * 5


def test_an_edited_task_file_evaluates_its_benchmark_again(shared, suite):
    score(shared, suite, limit=4)
    path = suite.tasks_folder / "mini3h_harm.yaml"
    path.write_text(path.read_text() + "\n# changed\n")
    reused = dict(zip([one.task for one in suite.benchmarks], score(shared, suite, limit=4)[1], strict=True))
    assert [task for task, was_reused in reused.items() if not was_reused] == ["mini3h_harm"]


def test_an_included_file_belongs_to_the_benchmark(suite):
    before = suite.benchmark_digest(suite.benchmarks[0], "test")
    shared_file = suite.tasks_folder / "_mini3h.yaml"
    shared_file.write_text(shared_file.read_text().replace("max_gen_toks: 8", "max_gen_toks: 9"))
    assert suite.benchmark_digest(suite.benchmarks[0], "test") != before


def test_a_model_without_a_tokenizer_is_refused_in_one_line(shared, suite, tmp_path):
    store, model = shared
    folder = tmp_path / "model"
    shutil.copytree(store.folder(model), folder, ignore=shutil.ignore_patterns("tokenizer*", "manifest.json"))
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        score((store, resolve(str(folder), store).ref), suite)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("3h-mni", "Nearest: '3h-mini'"), ("absent.yaml", "cannot be read")],
)
def test_an_unknown_suite_is_named(name, message):
    with pytest.raises(RecipeError, match=message):
        load_suite(name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dimension: honest", "dimension: hones", "dimension"),
        ("dimension: honest", "dimension: helpful", "no benchmark for honest"),
        ("mini3h_ans,", "mini3h_answers,", "no task file"),
    ],
)
def test_a_broken_suite_is_named(tmp_path, old, new, message):
    shipped = load_suite("3h-mini")
    shutil.copytree(shipped.tasks_folder, tmp_path / shipped.tasks)
    text = Path(shipped.folder / "3h-mini.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace(old, new))

    def digests():
        suite = load_suite(str(tmp_path / "mine.yaml"))
        return [suite.benchmark_digest(one, "test") for one in suite.benchmarks]

    with pytest.raises(RecipeError, match=message):
        digests()
