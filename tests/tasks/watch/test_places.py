"""Where checkpoints lie: real folders, a real S3 server, and a Hub on loopback."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks.watch.places import look
from tests.tasks.hub_stand_in import Client, Hub
from tests.tasks.remote.conftest import BUCKET, s3, s3_server  # noqa: F401
from tests.tasks.watch.tiny import write_model


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "runs" / "step-1")


def test_the_folder_itself_and_its_folders_are_places_oldest_change_first(model, tmp_path):
    shutil.copytree(model, tmp_path / "runs" / "step-2")
    for path in model.iterdir():
        shutil.copy(path, tmp_path / "runs")
    found = look(str(tmp_path / "runs"))
    assert [one.name for one in found] == ["step-1", "step-2", "."]
    assert found[2].source == str(tmp_path / "runs")
    assert all(time.time() - 60 < one.changed <= time.time() + 1 for one in found)


def test_a_copy_that_keeps_its_times_still_counts_as_just_written(model, tmp_path):
    for path in model.iterdir():
        os.utime(path, (1, 1))
    [one] = look(str(tmp_path / "runs"))
    assert time.time() - 60 < one.changed


def test_a_stamp_changes_with_any_file_and_only_then(model, tmp_path):
    [first] = look(str(tmp_path / "runs"))
    assert look(str(tmp_path / "runs")) == [first]
    (model / "generation_config.json").write_text("{}")
    assert look(str(tmp_path / "runs"))[0].stamp != first.stamp


def test_a_folder_that_is_not_there_is_an_error_that_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder .* Check the path, and that its disk is mounted"):
        look(str(tmp_path / "gone"))
    with pytest.raises(RecipeError, match="is made here and never changes"):
        look("mini3h://base")


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_found():
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        runs.chmod(0o755)
        write_model(runs / "step-1")
        (runs / "lost+found").mkdir(mode=0o000)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            found = {one.name: one for one in look(folder)}
            assert set(found) == {"step-1", "lost+found"}
            with pytest.raises(CheckpointError, match=r"lost\+found cannot be read \(Permission denied\)"):
                found["lost+found"].lacks()
        finally:
            os.seteuid(user)


def test_prefixes_of_a_prefix_are_places_with_the_storages_own_times_and_versions(s3, model):  # noqa: F811
    for path in model.iterdir():
        s3.client.upload_file(str(path), BUCKET, f"runs/step-1/{path.name}")
    s3.client.put_object(Bucket=BUCKET, Key="runs/logs/events.out", Body=b"x")
    [one] = look(f"s3://{BUCKET}/runs/")
    assert (one.name, one.source, one.lacks()) == ("step-1", f"s3://{BUCKET}/runs/step-1", "")
    assert abs(time.time() - one.changed) < 120

    whole = (model / "model.safetensors").read_bytes()
    s3.client.put_object(Bucket=BUCKET, Key="runs/step-1/model.safetensors", Body=whole[:-1])
    [cut] = look(f"s3://{BUCKET}/runs")
    assert cut.stamp != one.stamp
    assert cut.lacks() == f"model.safetensors has {len(whole) - 1:,} of {len(whole):,} bytes"
    s3.client.put_object(Bucket=BUCKET, Key="runs/step-1/model.safetensors", Body=b"")
    assert look(f"s3://{BUCKET}/runs")[0].lacks() == "model.safetensors has 0 of 8 bytes"


def test_an_empty_prefix_and_a_bucket_that_is_not_there_are_errors(s3):  # noqa: F811
    for url in (f"s3://{BUCKET}/runs", "s3://no-such-bucket/runs"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoints\. Check bucket, prefix"):
            look(url)


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp("hf"))
    yield client
    client.close()


def test_branches_of_a_repository_are_places_one_for_each_commit(hub, client, model):
    main = hub.commit("org/model", model)
    hub.branches["org/model", "alias"] = main
    other = hub.commit("org/model", model, "later", **{"generation_config.json": b"{}"})
    names = [["main", f"hf://org/model@{main}", ""], ["later", f"hf://org/model@{other}", ""]]
    assert client.ask("hf://org/model", look=True)["places"] == names
    assert client.ask("hf://org/model@later", look=True)["places"] == [names[1]]
    assert not {"model.safetensors"} & set(hub.downloads())


def test_a_commit_whose_index_names_shards_of_a_later_commit_is_incomplete(hub, client):
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": b"x"}
    hub.put("org/large", files)
    [[_, _, lacks]] = client.ask("hf://org/large", look=True)["places"]
    assert lacks == "lacks 1 of 3 files, first model-00002-of-00002.safetensors"


def test_a_repository_that_is_gone_says_so_without_words_of_the_client(hub, client):
    answer = client.ask("hf://org/none", look=True)
    assert answer["error"] == "CheckpointError"
    assert answer["message"].startswith("hf://org/none: no such repository, or it is private.")
