import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions

import pytest

from merging_core.errors import CheckpointError, ProcessError, RecipeError, StorageError
from tasks.store import NOTES, Ref, require_free

IDENTITY = {"version": 1, "scale": 0.5}


def writes(text):
    return lambda out: (out / "file").write_text(text) and None


def test_an_artifact_is_made_once_and_then_reused(store):
    first = store.build("scores", IDENTITY, writes("a"))
    second = store.build("scores", {"scale": 0.5, "version": 1.0}, lambda out: pytest.fail("made again"))
    assert (first.reused, second.reused) == (False, True)
    assert first.ref == second.ref
    assert (store.folder(first.ref) / "file").read_text() == "a"


def test_another_setting_is_another_artifact(store):
    assert store.build("scores", IDENTITY, writes("a")).ref != store.build("scores", {"scale": 1}, writes("a")).ref


def test_a_failure_leaves_nothing_behind(store):
    def fails(out):
        (out / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.build("scores", IDENTITY, fails)
    assert list((store.root / "scores").iterdir()) == []
    assert store.find("scores", IDENTITY) is None


@pytest.mark.parametrize(("kind", "resumed"), [("merged", True), ("task-vectors", True), ("scores", False)])
def test_an_interrupted_merge_finds_what_it_left(store, kind, resumed):
    def interrupted(out):
        (out / "half").write_text("half")
        (out / NOTES).mkdir()
        (out / NOTES / "file").write_text("note")
        raise KeyboardInterrupt

    def goes_on(out):
        assert (out / "half").exists() == (out / NOTES / "file").exists() == resumed
        (out / "file").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        store.build(kind, IDENTITY, interrupted)
    assert store.find(kind, IDENTITY) is None
    ref = store.build(kind, IDENTITY, goes_on).ref
    assert "file" in store.manifest(ref).files
    assert not (store.folder(ref) / NOTES).exists()
    assert store.problems(ref) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOSPC, "full")])
def test_a_merge_that_failed_frees_its_space(store, error):
    def fails(out):
        (out / "half").write_text("half")
        raise error

    with pytest.raises((ZeroDivisionError, CheckpointError)):
        store.build("merged", IDENTITY, fails)
    assert list((store.root / "merged").iterdir()) == []


@pytest.mark.parametrize("error", [StorageError("an outage"), ProcessError("its time limit")])
@pytest.mark.parametrize(("kind", "kept"), [("merged", True), ("scores", False)])
def test_what_may_pass_keeps_what_was_made_until_then(store, kind, kept, error):
    def fails(out):
        (out / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.build(kind, IDENTITY, fails)
    assert bool(list((store.root / kind).glob("*/half"))) == kept


def test_a_record_is_not_moved_while_another_makes_it(store, tmp_path):
    ref = store.build("checkpoint", IDENTITY, writes("text")).ref
    with ThreadPoolExecutor() as pool:
        with store.lock(f"checkpoint-{ref.digest}"):
            moving = pool.submit(store.relocate, ref, tmp_path, {})
            with pytest.raises(TimeoutError):
                moving.result(timeout=0.2)
        moving.result(timeout=30)
    assert store.folder(ref) == tmp_path


def test_a_folder_without_a_manifest_does_not_exist(store):
    ref = store.build("scores", IDENTITY, writes("a")).ref
    (store.home(ref) / "manifest.json").unlink()
    assert store.find("scores", IDENTITY) is None
    assert not store.build("scores", IDENTITY, writes("b")).reused
    assert (store.folder(ref) / "file").read_text() == "b"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("longer")])
def test_a_lost_or_cut_file_is_noticed_on_reuse(store, damage):
    ref = store.build("scores", IDENTITY, writes("a")).ref
    damage(store.folder(ref) / "file")
    assert not store.build("scores", IDENTITY, writes("a")).reused
    assert (store.folder(ref) / "file").read_text() == "a"


def test_an_unreadable_manifest_is_made_again(store):
    ref = store.build("scores", IDENTITY, writes("a")).ref
    (store.home(ref) / "manifest.json").write_text("{")
    assert not store.build("scores", IDENTITY, writes("a")).reused
    assert store.problems(ref) == []


def test_verify_finds_a_changed_byte_of_the_same_size(store):
    ref = store.build("scores", IDENTITY, writes("a")).ref
    (store.folder(ref) / "file").write_text("b")
    assert "content differs" in store.problems(ref)[0]


def test_the_manifest_says_what_made_it(store):
    parent = store.build("checkpoint", {"of": "base"}, writes("w")).ref
    ref = store.build("merged", IDENTITY, lambda out: (out / "f").write_text("x") and {"recipe": "r"}, [parent]).ref
    manifest = store.manifest(ref)
    assert manifest.parents == [f"checkpoint/{parent.digest}"]
    assert manifest.identity == IDENTITY
    assert manifest.details == {"recipe": "r"}
    assert manifest.files["f"]["size"] == 1
    installed = {one.metadata["Name"]: one.version for one in distributions()}
    for name in ("torch", "transformers", "trl", "peft", "datasketch", "optuna"):
        assert manifest.versions.get(name) == installed.get(name)
    assert "python" in manifest.versions


def test_files_in_place_are_made_again_when_they_change(store, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w").write_text("1")

    def refer(out):
        stat = (folder / "w").stat()
        return {"location": str(folder), "files": {"w": {"size": 1, "sha256": "-", "mtime_ns": stat.st_mtime_ns}}}

    built = store.build("checkpoint", IDENTITY, refer)
    assert store.folder(built.ref) == folder
    assert store.build("checkpoint", IDENTITY, refer).reused
    os.utime(folder / "w", ns=(1, 1))
    assert not store.build("checkpoint", IDENTITY, refer).reused


def test_lookup_takes_the_beginning_of_a_digest_and_refuses_what_is_ambiguous(store):
    one = store.build("scores", {"n": 1}, writes("a")).ref
    store.build("scores", {"n": 2}, writes("a"))
    assert store.lookup(f"scores/{one.digest[:20]}") == one
    assert store.lookup(one.digest) == one
    with pytest.raises(RecipeError, match="2 artifacts match"):
        store.lookup("scores/")
    with pytest.raises(RecipeError, match="no artifact"):
        store.lookup("ffff")
    with pytest.raises(RecipeError, match="not a kind"):
        store.lookup("score/ab")


def test_a_missing_artifact_is_named(store):
    with pytest.raises(CheckpointError, match="not in the store"):
        store.manifest(Ref("merged", "0" * 64))


def test_a_known_lack_of_space_is_reported_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="disk is full"):
        require_free(tmp_path / "not" / "there", 1 << 60, "the merge")


BUILDER = """
import os, sys, time
from pathlib import Path
from tasks.store import Store
root, log, wait = sys.argv[1], sys.argv[2], sys.argv[3]
def make(out):
    with open(log, "a") as file:
        file.write("made\\n")
    (out / "file").write_text("half")
    print("making", flush=True)
    if wait == "stdin":
        sys.stdin.readline()
    (out / "file").write_text("whole")
print("reused" if Store(root).build("scores", {"n": 1}, make).reused else "done", flush=True)
"""


def builder(store, log, wait):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, store.root, log, wait],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_processes_one_computes_and_the_other_waits_and_reuses(store, tmp_path):
    first = builder(store, tmp_path / "log", "stdin")
    assert first.stdout.readline() == "making\n"
    second = builder(store, tmp_path / "log", "no")
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.read() == "done\n"
    assert second.stdout.read() == "reused\n"
    assert (tmp_path / "log").read_text() == "made\n"
    assert {first.wait(), second.wait()} == {0}


def test_a_killed_holder_frees_its_lock_and_leaves_no_artifact(store, tmp_path):
    first = builder(store, tmp_path / "log", "stdin")
    assert first.stdout.readline() == "making\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert store.find("scores", {"n": 1}) is None
    built = store.build("scores", {"n": 1}, writes("whole"))
    assert not built.reused
    assert [path.name for path in (store.root / "scores").iterdir()] == [built.ref.digest]


def test_a_manifest_is_json_with_the_recorded_sizes(store):
    ref = store.build("scores", IDENTITY, writes("abc")).ref
    stored = json.loads((store.home(ref) / "manifest.json").read_text())
    assert stored["files"]["file"]["size"] == 3
    assert stored["digest"] == ref.digest
