"""What is missing of a checkpoint, at every moment of its upload."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tasks.watch.places import look
from tasks.watch.uploads import is_checkpoint, missing_parts
from tests.tasks.watch.tiny import write_model


def lacking(folder):
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return missing_parts(sizes, lambda name, num_bytes: (folder / name).open("rb").read(num_bytes))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "runs" / "step-1")


@pytest.fixture
def shards(model, tmp_path):
    """The same model in two shards with an index."""
    folder = shutil.copytree(model, tmp_path / "runs" / "step-2", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = sorted(load_file(model / "model.safetensors").items())
    index = {}
    for number, part in enumerate((tensors[:5], tensors[5:]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(dict(part), folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(dict(part), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_a_complete_checkpoint_lacks_nothing(model, shards):
    assert lacking(model) == ""
    assert lacking(shards) == ""


def test_a_file_that_grows_is_incomplete_until_its_last_byte(model):
    whole = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 7, 8, header - 1, header, header + 1, len(whole) - 1):
        (model / "model.safetensors").write_bytes(whole[:size])
        assert lacking(model).startswith(f"model.safetensors has {size:,} of "), size
    (model / "model.safetensors").write_bytes(whole)
    assert lacking(model) == ""


def test_an_index_that_names_shards_that_are_not_there_is_incomplete(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert lacking(shards) == "lacks 1 of 3 files, first model-00002-of-00002.safetensors"
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"a"')
    assert lacking(shards) == "model.safetensors.index.json is not complete"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "lacks 1 of 2 files, first config.json"),
        ("model.safetensors", "lacks 1 of 2 files, first model.safetensors"),
    ],
)
def test_weights_without_config_and_config_without_weights_are_incomplete(model, name, words):
    (model / name).unlink()
    assert lacking(model) == words


def test_an_adapter_needs_its_own_files(tmp_path, model):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert lacking(folder) == "lacks 1 of 2 files, first adapter_model.safetensors"
    shutil.copy(model / "model.safetensors", folder / "adapter_model.safetensors")
    assert lacking(folder) == ""


def test_damage_of_another_kind_is_left_to_the_resolver(model):
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    assert lacking(model) == ""
    (model / "model.safetensors").write_bytes((3).to_bytes(8, "little") + b"[1]")
    assert lacking(model) == ""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    assert lacking(model) == ""


def test_only_folders_that_hold_a_part_of_a_checkpoint_are_looked_at(tmp_path, model):
    assert not is_checkpoint(["events.out", "optimizer.pt", "tokenizer.json"])
    (tmp_path / "runs" / "logs").mkdir()
    (tmp_path / "runs" / "logs" / "events.out").write_text("")
    shutil.copytree(model, tmp_path / "runs" / ".step-2.partial")
    assert [one.name for one in look(str(tmp_path / "runs"))] == ["step-1"]
