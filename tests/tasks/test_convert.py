import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merging_core.errors import CheckpointError, RecipeError
from tasks.convert import convert, load_pickle
from tests.tasks.tiny_models import tiny_llama


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Bomb:
    """Runs a command when unpickled without care."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def make(folder, dtype=torch.float32, tied=False):
    """A tiny Llama saved as pytorch_model.bin; returns its state dict."""
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "trainer_state.json").write_text("{}")
    state = model.state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    return state


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def save_sharded(folder, state, lose=()):
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    files = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: state[n] for n in names if files[n] == file and n not in lose}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_model_loads_and_has_the_same_bits(tmp_path, dtype):
    state = make(tmp_path / "old", dtype)
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert left_in(tmp_path / "new") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(same_bits(written[name], state[name]) for name in state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").state_dict()
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert left_in(tmp_path) == ["new", "old"]


def test_tied_head_is_written_once_and_the_model_loads_tied(tmp_path):
    state = make(tmp_path / "old", tied=True)
    convert(str(tmp_path / "old"), tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert state.keys() - written.keys() == {"lm_head.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    assert all(same_bits(loaded[name], state[name]) for name in state)


def test_head_of_a_tied_config_stays_if_it_differs_from_the_embedding(tmp_path):
    state = make(tmp_path / "old", tied=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    convert(str(tmp_path / "old"), tmp_path / "new")
    assert "lm_head.weight" in load_file(tmp_path / "new" / "model.safetensors")


def test_views_into_one_storage_become_separate_copies_without_a_tied_config(tmp_path):
    state = make(tmp_path / "old")
    whole = torch.arange(24.0).reshape(4, 6)
    state |= {"lm_head.weight": state["model.embed_tokens.weight"], "scalar": torch.tensor(7)}
    state |= {"part": whole[1:3, ::2], "turned": whole.T, "stretched": whole[:1].expand(3, 6)}
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    convert(str(tmp_path / "old"), tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_sharded_pickles_convert_to_one_set_of_tensors(tmp_path):
    state = make(tmp_path / "old")
    save_sharded(tmp_path / "old", state)
    convert(str(tmp_path / "old"), tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(same_bits(written[name], state[name]) for name in state)


def test_nested_state_dict_of_torch_before_1_6_converts_into_an_empty_folder(tmp_path):
    state = make(tmp_path / "old")
    torch.save({"state_dict": state}, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "new").mkdir()
    convert(str(tmp_path / "old"), tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(same_bits(written[name], state[name]) for name in state)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, legacy):
    state = make(tmp_path / "old")
    canary = tmp_path / "canary"
    torch.save(
        state | {"bomb": Bomb(canary)},
        tmp_path / "old" / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(CheckpointError, match=r"contains code \(posix.system\) and was refused") as caught:
        convert(str(tmp_path / "old"), tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["old"]


def test_bomb_would_have_run_without_care(tmp_path):
    """Without this the test above could pass with a bomb that is a dud."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def no_config(folder, state):
    (folder / "config.json").unlink()


def no_weights(folder, state):
    (folder / "pytorch_model.bin").unlink()


def both(folder, state):
    shutil.copy(folder / "pytorch_model.bin", folder / "copy")
    save_sharded(folder, state)
    (folder / "copy").rename(folder / "pytorch_model.bin")


def shard_missing(folder, state):
    save_sharded(folder, state)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def tensor_missing(folder, state):
    save_sharded(folder, state, lose=["lm_head.weight"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "no config.json"),
        (no_weights, "nothing to convert"),
        (both, "one of them is stale"),
        (shard_missing, "1 of 2 shards are missing"),
        (tensor_missing, r"differ in 1 tensors, first \['lm_head.weight'\]"),
        (lambda folder, state: shutil.rmtree(folder), "no config.json"),
    ],
)
def test_unfit_source_is_refused_in_one_line_and_nothing_is_left(tmp_path, damage, words):
    state = make(tmp_path / "old")
    damage(tmp_path / "old", state)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(str(tmp_path / "old"), tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not set(left_in(tmp_path)) - {"old"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": torch.ones(1), "epoch": 3}, "entry 'epoch' is a int"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "entry 'state_dict' is a dict"),
        ({"state_dict": {"state_dict": {}}}, "entry 'state_dict' is a dict"),
        ({}, "holds a dict, expected names and tensors"),
        ([torch.ones(1)], "holds a list"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo"),
    ],
)
def test_pickle_of_more_than_tensors_is_refused_by_name(tmp_path, value, words):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=words):
        load_pickle(tmp_path / "x.bin")


def test_damaged_pickle_is_refused_wherever_it_is_cut(tmp_path):
    file = tmp_path / "x.bin"
    for zipped in (True, False):
        torch.save({"a": torch.ones(100)}, file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for size in (0, 1, len(whole) // 4, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="cut short or damaged"):
                load_pickle(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_pickle(file)


def test_reader_that_dies_leaves_nothing(tmp_path, monkeypatch):
    make(tmp_path / "old")
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(CheckpointError, match="ended with code -9"):
        convert(str(tmp_path / "old"), tmp_path / "new")
    assert left_in(tmp_path) == ["killer", "old"]


CONVERT = "import pathlib, sys, tasks.convert; tasks.convert.convert(sys.argv[1], pathlib.Path(sys.argv[2]))"


def test_reader_ends_with_a_killed_parent(tmp_path):
    """The index of the shards is a pipe, at which the reader waits for ever."""
    save_sharded(tmp_path / "old", make(tmp_path / "old"))
    index = tmp_path / "old" / "pytorch_model.bin.index.json"
    text = index.read_bytes()
    index.unlink()
    os.mkfifo(index)
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "old"), str(tmp_path / "new")]
    parent = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    left = []
    try:
        with opened(index, parent) as pipe:
            pipe.write(text)
        while not left and parent.poll() is None:
            left = psutil.Process(parent.pid).children()
            time.sleep(0.02)
        with opened(index, parent):
            parent.kill()
            _, left = psutil.wait_procs(left, timeout=20)
        assert not left, "the reader goes on without its parent"
    finally:
        parent.kill()
        parent.wait()
        for reader in left:
            reader.kill()


def opened(pipe, parent):
    """A named pipe for writing, as soon as somebody reads it."""
    deadline = time.monotonic() + 120
    while parent.poll() is None and time.monotonic() < deadline:
        try:
            return open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb")
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.02)
    pytest.fail(f"nobody reads {pipe.name}; the parent ended with {parent.poll()}")


def test_reader_sees_no_token(tmp_path, monkeypatch):
    make(tmp_path / "old")
    spy = tmp_path / "spy"
    spy.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\nexit 1\n")
    spy.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(spy))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CheckpointError):
        convert(str(tmp_path / "old"), tmp_path / "new")
    assert "hf_secret" not in (tmp_path / "seen").read_text()


def test_module_in_the_current_folder_is_not_imported_by_the_reader(tmp_path, monkeypatch):
    make(tmp_path / "old")
    (tmp_path / "old" / "torch.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path / "old")
    convert(".", tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_folder_that_is_not_empty_is_not_touched(tmp_path):
    make(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("x")
    with pytest.raises(RecipeError, match="not an empty folder"):
        convert(str(tmp_path / "old"), tmp_path / "new")
    assert left_in(tmp_path / "new") == ["mine"]
    with pytest.raises(RecipeError, match="Make it first"):
        convert(str(tmp_path / "old"), tmp_path / "absent" / "new")
