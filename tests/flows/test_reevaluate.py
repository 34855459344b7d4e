"""Looks at real sources with tiny models whose answers are known: what is scored, compared, told, left and kept."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.pipeline import Exam
from flows.watch_parameters import Watch, load_watch
from flows.watching import look_again
from merging_core.errors import CheckpointError, RecipeError
from tasks.comparison import DIMENSIONS
from tasks.scores import SAMPLES_FILE
from tasks.steps import Direct
from tasks.store import MANIFEST, Store, record_file
from tasks.watch.events import IMPROVED, REGRESSED, UNREACHABLE
from tasks.watch.looks import look_around
from tasks.watch.records import Laboratory
from tasks.watch.state import accepted_scores, remembered
from tests.tasks.hub_stand_in import Hub
from tests.tasks.remote.conftest import BUCKET, s3, s3_server  # noqa: F401
from tests.tasks.watch.tiny import ALL, share, watch_file, without, write_model, write_suite


@pytest.fixture
def runs(tmp_path):
    """The folder that is watched, with one checkpoint that knows everything; and a suite beside it."""
    write_suite(tmp_path / "suite")
    write_model(tmp_path / "runs" / "step-1")
    return tmp_path / "runs"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def look(runs, store):
    """Look once; gives what was found. Every event is in ``look.told``; the last page's folder in ``look.page``."""

    def once(sources=None, published="", **more):
        watch = load_watch(watch_file(runs.parent, sources or {"tuned": str(runs)}, **more))
        report, found = look_again(watch, Direct(store), once.told.append, published)
        once.page = store.folder(report)
        return found

    once.told = []
    return once


def verdicts(found):
    return [(one.place, one.verdict, one.accepted) for one in found.recorded]


def num_scores(store):
    return len(store.refs("scores"))


def state_of(store, name="nightly"):
    return json.loads((store.root / "watches" / name / "state.json").read_text())


def test_the_first_is_accepted_and_an_equal_copy_is_recorded_without_an_evaluation(look, runs, store):
    assert verdicts(look()) == [("step-1", "first", True)]
    assert num_scores(store) == 3
    shutil.copytree(runs / "step-1", runs / "same")
    assert verdicts(look()) == [("same", "copy", False)]
    assert verdicts(look()) == []
    assert num_scores(store) == 3
    lines = state_of(store)["history"]
    assert lines[0]["digest"] == lines[1]["digest"]
    assert look.told == []


def test_a_fall_that_the_samples_prove_is_told_with_its_numbers_and_not_accepted(look, runs):
    look()
    write_model(runs / "step-2", without("fk"), seed=2)
    assert verdicts(look()) == [("step-2", "regressed", False)]
    told = {event.payload["dimension"]: event for event in look.told}
    assert set(told) == {"helpful", "harmless"}
    for dimension, event in told.items():
        assert (event.name, event.model, event.payload["watch"]) == (REGRESSED, "tuned", "nightly")
        difference = share(dimension, without("fk")) - 1
        assert event.payload["difference"] == pytest.approx(difference)
        assert event.payload["benchmarks"] == {dimension: pytest.approx(difference)}
        assert event.payload["low"] < difference < event.payload["high"] < 0
        assert event.payload["p"] < 0.05
        assert event.payload["why"] == "significant"
    # What comes next is still held against the accepted one.
    write_model(runs / "step-3", without("fk"), seed=3)
    [third] = look().recorded
    assert third.verdict == "regressed"
    assert third.against == told["helpful"].payload["accepted_digest"]


def test_a_fall_that_may_be_chance_is_no_regression_and_leaves_the_accepted_one(look, runs, store):
    look()
    first = state_of(store)["accepted"]
    write_model(runs / "step-2", without("g"), seed=2)
    found = look()
    assert verdicts(found) == [("step-2", "unchanged", False)]
    change = found.recorded[0].changes["helpful"]
    assert (change["value"], change["p"] > 0.05) == (pytest.approx(-1 / 40), True)
    assert state_of(store)["accepted"] == first
    assert look.told == []


def test_a_fall_beyond_the_tolerance_is_a_regression_that_says_it_is_not_proved(look, runs):
    look(tolerance=0.02)
    write_model(runs / "step-2", without("g"), seed=2)
    assert verdicts(look(tolerance=0.02)) == [("step-2", "regressed", False)]
    [event] = look.told
    assert (event.name, event.payload["why"]) == (REGRESSED, "beyond the tolerance")
    assert event.payload["p"] > 0.05


def test_an_improvement_is_told_accepted_and_what_the_next_is_compared_with(look, runs, store):
    shutil.rmtree(runs / "step-1")
    write_model(runs / "step-1", without("fh"))
    look()
    write_model(runs / "step-2", without("h"), seed=2)
    found = look()
    assert verdicts(found) == [("step-2", "improved", True)]
    [event] = look.told
    assert (event.name, event.payload["dimension"]) == (IMPROVED, "helpful")
    assert event.payload["difference"] == pytest.approx(9 / 40)
    write_model(runs / "step-3", without("fh"), seed=3)
    assert verdicts(look()) == [("step-3", "regressed", False)]
    # Only the scores of the accepted one are kept from garbage collection.
    assert {ref.digest for ref in accepted_scores(store)} == set(found.recorded[0].refs)


def test_where_nothing_is_accepted_by_itself_a_person_approves(look, runs, store):
    first = look(accept="never")
    assert verdicts(first) == [("step-1", "unjudged", False)]
    write_model(runs / "step-2", without("e"), seed=2)
    assert verdicts(look(accept="never")) == [("step-2", "unjudged", False)]
    with pytest.raises(RecipeError, match="no scored checkpoint matches"):
        look(accept="never", approve=["0123456789"])
    write_model(runs / "step-3", without("e"), seed=3)
    found = look(accept="never", approve=[first.recorded[0].digest[:10]])
    assert verdicts(found) == [("step-3", "regressed", False)]
    write_model(runs / "step-4", ALL, seed=4)
    assert verdicts(look(accept="never")) == [("step-4", "unchanged", False)]
    assert state_of(store)["accepted"] == {"tuned": first.recorded[0].digest}


def test_what_is_still_uploaded_is_left_for_the_next_time(look, runs, store):
    whole = (runs / "step-1" / "model.safetensors").read_bytes()
    (runs / "step-1" / "model.safetensors").write_bytes(whole[:-8])
    [left] = look().left
    assert (left["watched"], left["place"]) == ("tuned", "step-1")
    assert left["why"] == f"model.safetensors has {len(whole) - 8:,} of {len(whole):,} bytes"
    (runs / "step-1" / "model.safetensors").write_bytes(whole)
    [left] = look(settle_s=3600).left
    assert left["why"].endswith("s ago, less than 3600 s")
    assert num_scores(store) == 0
    assert "step-1: left for the next time, incomplete" in (look.page / "trend.html").read_text()
    found = look()
    assert (verdicts(found), found.left, found.warnings) == ([("step-1", "first", True)], [], [])


def test_what_is_said_to_be_published_need_not_settle_but_must_be_complete(look, runs):
    other = write_model(runs.parent / "others" / "one", seed=7).parent
    whole = (runs / "step-1" / "model.safetensors").read_bytes()
    (runs / "step-1" / "model.safetensors").write_bytes(whole[:-8])
    asked = {"sources": {"tuned": str(runs), "other": str(other)}, "published": "tuned", "settle_s": 3600}
    found = look(**asked)
    assert [(one["watched"], one["why"].split()[0]) for one in found.left] == [
        ("tuned", "model.safetensors"),
        ("other", "written"),
    ]
    (runs / "step-1" / "model.safetensors").write_bytes(whole)
    assert verdicts(look(**asked)) == [("step-1", "first", True)]


@pytest.mark.parametrize("change", [("config.json", "{"), ("trainer_state.json", "{}"), ("model.safetensors", None)])
def test_what_changes_while_it_is_scored_is_left_and_scored_as_it_is_next_time(runs, store, change):
    watch = load_watch(watch_file(runs.parent, {"tuned": str(runs)}))
    run = Direct(store)
    exam = Exam.of(watch, run)
    kept = shutil.copytree(runs / "step-1", runs.parent / "kept")
    file, text = runs / "step-1" / change[0], change[1]

    def scores(model, name):
        if text is None:
            file.write_bytes(file.read_bytes())
        else:
            file.write_text(text)
        return exam.scores(model, name)

    resolve = lambda source: run.resolve([source])[0]  # noqa: E731
    with remembered(watch.name, store) as state:
        laboratory = Laboratory(resolve, scores, exam.suite, store)
        found = look_around(watch.watched(), watch.terms(), laboratory, state, print)
        assert found.left[0]["why"].startswith("it changed while it was read (")
        assert (found.recorded, found.failed) == ([], [])
        shutil.copytree(kept, runs / "step-1", dirs_exist_ok=True)
        laboratory = Laboratory(resolve, exam.scores, exam.suite, store)
        found = look_around(watch.watched(), watch.terms(), laboratory, state, print)
        assert verdicts(found) == [("step-1", "first", True)]


def test_a_damaged_checkpoint_is_a_warning_and_does_not_keep_others_from_being_scored(look, runs):
    write_model(runs / "damaged", seed=2)
    header = (3).to_bytes(8, "little") + b"[1]"
    (runs / "damaged" / "model.safetensors").write_bytes(header + b"x" * 1000)
    write_model(runs / "step-2", seed=3)
    found = look()
    assert [place for place, *_ in verdicts(found)] == ["step-1", "step-2"]
    [failed] = found.failed
    assert failed["place"] == "damaged"
    assert "not a complete safetensors file" in found.warnings[0]
    assert len(look().failed) == 1, "it stays a warning until it is repaired or gone"
    shutil.rmtree(runs / "damaged")
    assert look().warnings == []


def test_a_source_that_disappears_is_told_once_and_others_are_looked_at(look, runs, store):
    other = write_model(runs.parent / "others" / "one", seed=7).parent
    sources = {"gone": str(other), "tuned": str(runs)}
    assert len(look(sources).recorded) == 2
    other.rename(runs.parent / "away")
    write_model(runs / "step-2", seed=2)
    found = look(sources)
    assert verdicts(found) == [("step-2", "unchanged", True)]
    assert found.unreachable[0]["watched"] == "gone"
    assert "no folder" in found.warnings[0]
    look(sources)
    assert [(event.name, event.model) for event in look.told] == [(UNREACHABLE, "gone")]
    assert "gone: not reachable since" in (look.page / "trend.html").read_text()
    # What it had is remembered: when it is back, nothing is scored again.
    (runs.parent / "away").rename(other)
    made = num_scores(store)
    assert (verdicts(look(sources)), num_scores(store)) == ([], made)
    other.rename(runs.parent / "away")
    look(sources)
    assert len(look.told) == 2


def test_a_watch_of_which_no_source_can_be_looked_at_fails(look, runs):
    shutil.rmtree(runs)
    with pytest.raises(CheckpointError, match="none of the 1 watched sources can be looked at"):
        look()


def test_another_suite_scores_the_accepted_one_again_and_compares_on_that(look, runs):
    look()
    write_model(runs / "step-2", without("e"), seed=2)
    [again, new] = look(limit=20).recorded
    assert (again.place, again.verdict, again.partial) == ("step-1", "rescored", True)
    assert (new.verdict, new.against, new.measure) == ("regressed", again.digest, again.measure)
    assert new.scores["helpful"]["n"] == 20


def test_an_accepted_one_that_cannot_be_scored_again_is_not_replaced_silently(look, runs, store):
    look()
    accepted = state_of(store)["accepted"]
    shutil.rmtree(runs / "step-1")
    write_model(runs / "step-2", without("e"), seed=2)
    write_model(runs / "step-2b", without("e"), seed=5)
    found = look(limit=20)
    assert verdicts(found) == [("step-2", "unjudged", False), ("step-2b", "unjudged", False)]
    assert len(found.warnings) == 1, "it is tried once, not for every new one"
    assert "the accepted checkpoint cannot be scored on this suite any more" in found.warnings[0]
    assert state_of(store)["accepted"] == accepted
    # On the suite that it was scored on, its scores are still there.
    write_model(runs / "step-3", without("e"), seed=3)
    assert verdicts(look()) == [("step-3", "regressed", False)]


def test_what_was_told_before_a_crash_is_told_again_under_the_same_id_and_computed_once(look, runs, store):
    look()
    write_model(runs / "step-2", without("e"), seed=2)
    told = look.told

    class Crash(BaseException):
        pass

    def tell(event):
        told.append(event)
        raise Crash

    watch = load_watch(watch_file(runs.parent, {"tuned": str(runs)}))
    with pytest.raises(Crash):
        look_again(watch, Direct(store), tell)
    made = num_scores(store)
    assert [one["verdict"] for one in state_of(store)["history"]] == ["first", "regressed"]
    assert verdicts(look()) == []
    assert num_scores(store) == made
    assert len(told) == 2
    assert (told[0], told[0].id) == (told[1], told[1].id)
    look()
    assert len(told) == 2


def test_what_could_not_be_told_is_a_warning_and_told_by_the_next_look_under_the_same_id(look, runs, store):
    look()
    write_model(runs / "step-2", without("e"), seed=2)
    watch = load_watch(watch_file(runs.parent, {"tuned": str(runs)}))

    def refuse(event):
        raise ConnectionError("nobody there")

    _, found = look_again(watch, Direct(store), refuse)
    assert verdicts(found) == [("step-2", "regressed", False)]
    assert found.warnings == [
        "1 events could not be told (ConnectionError: nobody there). Check the server; the next run tells them."
    ]
    # A look that has nobody to tell keeps it too.
    assert look_again(watch, Direct(store), None)[1].warnings == []
    assert look().warnings == []
    assert [event.id for event in look.told] == [event.id for event in found.events]


def test_a_folder_that_is_empty_where_checkpoints_were_is_unreachable_and_stays_remembered(look, runs, store):
    other = write_model(runs.parent / "others" / "one", seed=7).parent
    sources = {"unmounted": str(other), "tuned": str(runs)}
    look(sources)
    (other / "one").rename(runs.parent / "away")
    [warning] = look(sources).warnings
    assert "holds no checkpoints any more, before it held one. Check that its disk is mounted" in warning
    assert [(event.name, event.model) for event in look.told] == [(UNREACHABLE, "unmounted")]
    (runs.parent / "away").rename(other / "one")
    made = num_scores(store)
    found = look(sources)
    assert (verdicts(found), found.warnings, num_scores(store)) == ([], [], made)


def test_a_source_of_no_known_form_is_refused_before_any_is_looked_at(look, runs, store):
    for wrong in ("hf://tuned", "hf://org/-tuned", "nosuch://bucket/runs"):
        with pytest.raises(RecipeError):
            look({"tuned": str(runs), "wrong": wrong})
    assert num_scores(store) == 0


def test_a_change_of_what_a_benchmark_counts_scores_the_accepted_one_again(look, runs, store):
    look()
    path = runs.parent / "suite" / "suite.yaml"
    suite = yaml.safe_load(path.read_text())
    suite["benchmarks"][0]["higher_is_better"] = False
    path.write_text(yaml.safe_dump(suite))
    write_model(runs / "step-2", without("e"), seed=2)
    [again, new] = look().recorded
    assert (again.verdict, new.against) == ("rescored", again.digest)
    assert (again.scores["helpful"]["value"], new.verdict) == (0, "improved")
    assert again.measure != state_of(store)["history"][0]["measure"]


def test_other_versions_of_the_libraries_are_said_beside_a_verdict(look, runs, store):
    first = look().recorded[0]
    for ref in first.refs:
        path = store.root / "scores" / ref / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["versions"]["torch"] = "1.0"
        path.write_text(json.dumps(manifest))
    write_model(runs / "step-2", without("e"), seed=2)
    found = look()
    [new] = found.recorded
    assert new.caution.startswith("the accepted one was scored with torch 1.0, this one with 2.")
    assert found.warnings == [f"tuned, step-2: {new.caution}"]
    assert new.caution in (look.page / "trend.html").read_text()


def test_samples_without_a_verdict_are_left_out_and_counted(look, runs, store):
    first = look().recorded[0]
    # As a judge leaves it whose replies to three questions could not be read.
    folder = store.root / "scores" / first.refs[0]
    rows = pq.read_table(folder / SAMPLES_FILE).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"value": None} for row in rows[:3]] + rows[3:]), folder / SAMPLES_FILE)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][SAMPLES_FILE] = record_file(folder / SAMPLES_FILE)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    write_model(runs / "step-2", without("e"), seed=2)
    [new] = look().recorded
    counted = {key: (one["n"], one["left_out"]) for key, one in new.changes.items()}
    assert counted == {"helpful": (37, 3), "honest": (40, 0), "harmless": (40, 0), "mean": (117, 3)}
    [event] = look.told
    assert (event.payload["n"], event.payload["left_out"]) == (37, 3)
    assert "over 37, 3 left out: no verdict" in (look.page / "trend.html").read_text()


def test_a_place_that_goes_back_to_an_earlier_content_is_recorded(look, runs):
    look()
    kept = (runs / "step-1").rename(runs.parent / "kept")
    write_model(runs / "step-1", without("e"), seed=2)
    assert verdicts(look()) == [("step-1", "regressed", False)]
    shutil.rmtree(runs / "step-1")
    shutil.copytree(kept, runs / "step-1")
    assert verdicts(look()) == [("step-1", "copy", False)]
    os.utime(runs / "step-1" / "config.json")
    assert verdicts(look()) == []


def test_the_trend_is_a_page_without_network_a_table_and_a_record(look, runs):
    look()
    first = look.page
    look()
    assert look.page == first, "nothing new: the page is reused"
    write_model(runs / "<b>step-2", without("f"), seed=2)
    look()
    rows = pq.read_table(look.page / "trend.parquet").to_pylist()
    values = {(row["place"], row["dimension"]): row["value"] for row in rows}
    for dimension in DIMENSIONS:
        assert values["step-1", dimension] == 1
        assert values["<b>step-2", dimension] == pytest.approx(share(dimension, without("f")))
    errors = {row["place"]: row["stderr"] for row in rows if row["dimension"] == "helpful"}
    fraction = 31 / 40
    assert errors["<b>step-2"] == pytest.approx((fraction * (1 - fraction) / 39) ** 0.5)
    page = (look.page / "trend.html").read_text()
    assert "&lt;b&gt;step-2" in page
    assert "<b>step-2" not in page
    assert "default-src 'none'" in page
    assert len(json.loads((look.page / "trend.json").read_text())["history"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"toleranse": 1}, "has no entry 'toleranse'. Nearest: 'tolerance'."),
        ({"tolerance": 0}, "tolerance: Input should be greater than 0"),
        ({"settle_s": -1}, "settle_s"),
        ({"accept": "always"}, "accept: Input should be 'automatic-if-not-worse' or 'never'"),
        ({"sources": {}}, "sources"),
        ({"sources": {"a b": "x"}}, "sources.0.name"),
        ({"sources": {"a": "mini3h://base"}}, "is made here and never changes"),
        ({"sources": [{"name": "a", "source": "x"}, {"name": "a", "source": "y"}]}, "'a' stands twice"),
        ({"second_judges": {"refusal": {"name": "classifier", "model": "m"}}}, "second_judges"),
        ({"approve": ["x"]}, "approve.0"),
    ],
)
def test_a_wrong_entry_of_a_watch_file_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(RecipeError) as error:
        load_watch(watch_file(tmp_path, **{"sources": {"tuned": "runs"}} | changes))
    assert words in str(error.value)


def test_every_field_of_the_run_form_has_a_title_and_a_text():
    from prefect.utilities.callables import parameter_schema

    from flows.reevaluate import reevaluate

    definitions = parameter_schema(reevaluate).model_dump_for_openapi()["definitions"]
    for name in ("Watch", "WatchedSource"):
        for field, shape in definitions[name]["properties"].items():
            assert shape.get("title") or "$ref" in shape, f"{name}.{field}"
            assert shape.get("description"), f"{name}.{field}"


def test_the_command_line_delivers_the_page_again_and_again_into_one_folder(tripoise, runs, tmp_path):
    file, out = watch_file(tmp_path, {"tuned": str(runs)}), tmp_path / "out"
    code, printed, err = tripoise("reevaluate", file, "--out", out)
    assert (code, "tripoise:" in err) == (0, False)
    assert "first, accepted  helpful 1.000 ± 0.000" in printed
    write_model(runs / "step-2", without("f"), seed=2)
    summary = json.loads(tripoise("reevaluate", file, "--out", out, "--json")[1])
    assert [one["verdict"] for one in summary["recorded"]] == ["regressed"]
    assert [one["event"] for one in summary["events"]] == [REGRESSED]
    assert not summary["reused"]
    code, printed, _ = tripoise("reevaluate", file, "--out", out)
    assert (code, printed.splitlines()[-2:]) == (0, ["nothing new", f"trend: {out / 'trend.html'}"])
    assert "step-2" in (out / "trend.html").read_text()
    digest = summary["recorded"][0]["digest"][:12]
    assert tripoise("reevaluate", file, "--out", out, "--approve", digest)[0] == 0
    assert f"Accepted: <code>{digest}" in (out / "trend.html").read_text()
    # A folder that holds anything else is as safe as with every command.
    (out / "notes.txt").write_text("mine")
    code, _, err = tripoise("reevaluate", file, "--out", out)
    assert (code, "first 'notes.txt'" in err) == (1, True)
    assert (out / "notes.txt").exists()


def test_two_runs_at_the_same_time_evaluate_once(runs, tmp_path):
    file = watch_file(tmp_path, {"tuned": str(runs)})
    environment = os.environ | {"TRIPOISE_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "reevaluate", str(file), "--out", str(tmp_path / name), "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in ("first", "second")
    ]
    try:
        summaries = [json.loads(process.communicate(timeout=300)[0]) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(one["recorded"]) for one in summaries) == [0, 1]
    assert sorted(one["reused"] for one in summaries) == [False, True]
    assert num_scores(Store(tmp_path / "store")) == 3


def test_an_s3_prefix_is_downloaded_once_and_what_is_new_in_it_scored(s3, look, runs):  # noqa: F811
    def upload(folder):
        for path in folder.iterdir():
            s3.client.upload_file(str(path), BUCKET, f"runs/{folder.name}/{path.name}")

    sources = {"tuned": f"s3://{BUCKET}/runs"}
    upload(runs / "step-1")
    assert verdicts(look(sources)) == [("step-1", "first", True)]
    upload(write_model(runs / "step-2", without("e"), seed=2))
    s3.requests.clear()
    assert verdicts(look(sources)) == [("step-2", "regressed", False)]
    read = {path.split("?")[0] for method, path, _ in s3.requests if method == "GET" and "safetensors" in path}
    assert read == {f"/{BUCKET}/runs/step-2/model.safetensors"}
    s3.requests.clear()
    assert verdicts(look(sources)) == []
    assert not [path for method, path, _ in s3.requests if method == "GET" and "safetensors" in path]


def test_a_new_commit_on_the_hub_is_scored_and_a_branch_of_the_same_content_is_not(runs, tmp_path):
    hub = Hub()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "TRIPOISE_STORE": str(tmp_path / "store"),
        "OMP_NUM_THREADS": "1",
    }
    file = watch_file(tmp_path, {"tuned": "hf://org/tuned"})

    def once():
        command = [sys.executable, "-m", "flows.cli", "reevaluate", str(file), "--out", str(tmp_path / "out"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return [(one["place"], one["verdict"]) for one in json.loads(done.stdout)["recorded"]]

    try:
        hub.commit("org/tuned", runs / "step-1")
        assert once() == [("main", "first")]
        hub.commit("org/tuned", runs / "step-1", "release", **{"README.md": b"the same weights"})
        hub.commit("org/tuned", write_model(tmp_path / "new", without("e"), seed=2))
        assert once() == [("main", "regressed"), ("release", "copy")]
    finally:
        hub.close()


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_completes_with_warnings_where_a_source_is_gone_and_fails_where_all_are(runs, store, monkeypatch):
    from flows.reevaluate import reevaluate

    monkeypatch.setenv("TRIPOISE_STORE", str(store.root))
    sources = [{"name": "tuned", "source": str(runs)}, {"name": "gone", "source": str(runs / "gone")}]
    plain = {"suite": str(runs.parent / "suite" / "suite.yaml"), "settle_s": 0, "sources": sources}
    state = reevaluate(Watch.model_validate(plain), return_state=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Warnings")
    assert "gone: " in state.message
    result = state.result()
    assert [one["verdict"] for one in result["recorded"]] == ["first"]
    assert Path(store.folder(store.lookup(result["report"])) / "trend.html").is_file()
    state = reevaluate(Watch.model_validate(plain | {"sources": sources[1:]}), return_state=True)
    assert state.type.value == "FAILED"
    state = reevaluate(Watch.model_validate(plain | {"sources": sources[:1]}), return_state=True)
    assert (state.type.value, state.name, state.result()["recorded"]) == ("COMPLETED", "Completed", [])


@pytest.mark.usefixtures("prefect_server")
def test_what_a_look_without_a_server_found_is_told_to_the_server_by_the_next_run(tripoise, runs, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.reevaluate import _tell, reevaluate

    store = Store(runs.parent / "store")
    file = watch_file(runs.parent, {"tuned": str(runs)})
    assert tripoise("reevaluate", file, "--out", runs.parent / "out")[0] == 0
    write_model(runs / "step-2", without("e"), seed=2)
    assert tripoise("reevaluate", file, "--out", runs.parent / "out")[0] == 0
    with remembered("nightly", store) as state:
        [untold] = state.untold
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: nowhere}), pytest.raises(httpx.HTTPError):
            _tell(untold)
    monkeypatch.setenv("TRIPOISE_STORE", str(store.root))
    state = reevaluate(load_watch(file), return_state=True)
    assert (state.name, state.result()["recorded"]) == ("Completed", [])
    assert state_of(store)["untold"] == []

    def arrived():
        asked = {"filter": {"event": {"name": [REGRESSED]}}}
        with get_client(sync_client=True) as client:
            return client.request("POST", "/events/filter", json=asked).json()["events"]

    deadline = time.monotonic() + 60
    while not (found := arrived()):
        assert time.monotonic() < deadline, "the event did not arrive"
        time.sleep(0.2)
    assert [(one["id"], one["payload"]) for one in found] == [(str(untold.id), untold.payload)]
    assert [one["prefect.resource.id"].rpartition(".")[0] for one in found[0]["related"]] == ["prefect.flow-run"]


def test_the_shipped_watch_file_is_a_watch():
    watch = load_watch(Path(__file__).parents[2] / "recipes" / "reevaluate.yaml")
    assert (watch.name, watch.settle_s, [one.name for one in watch.sources]) == ("reevaluate", 60, ["tuned"])
