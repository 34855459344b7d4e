"""Killing a merge at any moment: no half artifact, and the rerun gives the same bytes."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import merging_core.merge
from flows.pipeline import Kitchen, pin
from merging_core.digest import file_sha256
from tasks.deliver import deliver_artifact
from tasks.recipes import load_recipe
from tasks.steps import Direct
from tasks.store import KINDS, NOTES, Store

# What a process does to the file system, as CPython reports it to audit hooks.
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"}


def merge(recipe_file, store_root, out):
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_file)
    run = Direct(Store(store_root))
    base = pin({"base": recipe.base}, run)["base"]
    merged = Kitchen(run, base, pin({one.name: one.source for one in recipe.experts}, run)).merge(recipe)
    deliver_artifact(merged, out, run.store)


def merge_in_child(recipe_file, store_root, out, kill_at, below=None):
    """Merge in a forked process that kills itself at its ``kill_at``-th touch of store or output or of ``below``.

    Gives whether it was killed.
    """
    below = str(below or Path(store_root).parent)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in TOUCHES and str(arguments[0]).startswith(below):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = 1
    try:
        merge(recipe_file, store_root, out)
        code = 0
    finally:
        os._exit(code)


def fingerprint(folder):
    """Every file but the manifest, whose times differ from run to run."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def assert_only_whole_artifacts(store):
    for kind in KINDS:
        for folder in (store.root / kind).glob("[!.]*"):
            assert (folder / "manifest.json").exists(), folder
    assert all(store.problems(ref) == [] for ref in store.refs())


@pytest.mark.timeout(600)
def test_a_merge_killed_at_any_touch_of_the_disk_leaves_no_half_artifact_and_reruns_to_the_same_bytes(
    recipe_file, tmp_path
):
    recipe = recipe_file()
    merge(recipe, tmp_path / "whole" / "store", tmp_path / "whole" / "out")
    expected = fingerprint(tmp_path / "whole" / "out")
    kills = 0
    at = 1
    while True:
        root = tmp_path / f"kill{at}"
        root.mkdir()
        if not merge_in_child(recipe, root / "store", root / "out", at):
            break
        kills += 1
        assert_only_whole_artifacts(Store(root / "store"))
        assert not (root / "out").exists() or fingerprint(root / "out") == expected
        merge(recipe, root / "store", root / "out")
        assert fingerprint(root / "out") == expected
        assert_only_whole_artifacts(Store(root / "store"))
        assert not list(root.glob(".*")), "a leftover beside the output folder"
        # Every touch at the start, then strides: the later ones repeat the pattern of a step.
        at += 1 if at < 40 else 7
    assert kills > 40


@pytest.mark.timeout(600)
def test_a_merge_killed_at_any_touch_of_its_folder_goes_on_with_the_next_unfinished_shard(
    recipe_file, tmp_path, monkeypatch
):
    computed = []
    write = merging_core.merge.write_checkpoint

    def counted(folder, tensors, compute, **options):
        write(folder, tensors, lambda name: computed.append(name) or compute(name), **options)

    monkeypatch.setattr(merging_core.merge, "write_checkpoint", counted)
    recipe = recipe_file()
    recipe.write_text(recipe.read_text() + "max_shard_bytes: 1500\n")
    prepared = tmp_path / "prepared"
    merge(recipe, prepared / "store", prepared / "out")
    num_tensors = len(computed)
    expected, wanted = fingerprint(prepared / "out"), details(prepared)
    assert len(list((prepared / "out").glob("*.safetensors"))) > 3
    shutil.rmtree(prepared / "store" / "merged")
    shutil.rmtree(prepared / "out")
    numbers = set()
    for at in range(1, 1000, 2):
        root = tmp_path / f"kill{at}"
        shutil.copytree(prepared, root)
        if not merge_in_child(recipe, root / "store", root / "out", at, root / "store" / "merged"):
            break
        finished = {
            name
            for file in (root / "store" / "merged").glob(".*.partial/*.safetensors")
            # The notes are removed just before the artifact appears; in between all is computed again.
            if (file.parent / NOTES / f"{file.name}.json").exists()
            for name in tensors_of(file)
        }
        if not merged_refs(root):
            computed.clear()
            merge(recipe, root / "store", root / "out")
            assert len(computed) == num_tensors - len(finished)
            assert not finished & set(computed)
            numbers.add(len(computed))
        merge(recipe, root / "store", root / "out")
        assert fingerprint(root / "out") == expected
        assert_only_whole_artifacts(Store(root / "store"))
        assert details(root) == wanted
        assert len(list((root / "store" / "merged").iterdir())) == 1, "a leftover"
    assert {0, num_tensors} < numbers
    assert len(numbers) > 4


def merged_refs(root):
    return Store(root / "store").refs("merged")


def details(root):
    """What the manifest says besides the bytes: the diagnostics of every tensor, once."""
    return [Store(root / "store").manifest(ref).details for ref in merged_refs(root)]


def tensors_of(file):
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
