import json
import os

import pytest

from merging_core.errors import RecipeError
from tasks.deliver import check_replaceable, deliver_artifact


def model(store, text):
    def make(out):
        (out / "model.safetensors").write_text(text)
        (out / "sub").mkdir()
        (out / "sub" / "recipe.yaml").write_text("r")

    return store.build("merged", {"text": text}, make).ref


def listing(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_whole_artifact_arrives(store, tmp_path):
    ref = model(store, "one")
    deliver_artifact(ref, tmp_path / "new" / "out", store)
    assert listing(tmp_path / "new" / "out") == listing(store.home(ref))


def test_weights_share_their_bytes_with_the_store_and_are_read_only(store, tmp_path):
    ref = model(store, "one")
    deliver_artifact(ref, tmp_path / "out", store)
    weights = tmp_path / "out" / "model.safetensors"
    assert os.path.samefile(weights, store.home(ref) / "model.safetensors")
    assert weights.stat().st_mode & 0o222 == 0


def test_delivering_the_same_model_again_is_no_error(store, tmp_path):
    ref = model(store, "one")
    deliver_artifact(ref, tmp_path / "out", store)
    (tmp_path / "out" / "sub" / "recipe.yaml").unlink()
    deliver_artifact(ref, tmp_path / "out", store)
    assert listing(tmp_path / "out") == listing(store.home(ref))


def test_another_model_is_replaced_only_on_request(store, tmp_path):
    deliver_artifact(model(store, "one"), tmp_path / "out", store)
    before = listing(tmp_path / "out")
    with pytest.raises(RecipeError, match="another artifact"):
        deliver_artifact(model(store, "two"), tmp_path / "out", store)
    assert listing(tmp_path / "out") == before
    deliver_artifact(model(store, "two"), tmp_path / "out", store, replace=True)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_foreign_files_are_left_alone(store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="did not write"):
        deliver_artifact(model(store, "one"), tmp_path / "out", store)
    assert listing(tmp_path / "out") == {"thesis.tex": "years of work"}


def test_a_report_does_not_take_the_place_of_a_model(store, tmp_path):
    deliver_artifact(model(store, "one"), tmp_path / "out", store)
    with pytest.raises(RecipeError, match="another artifact"):
        check_replaceable(tmp_path / "out", "report", False)


def test_a_file_is_no_place_for_a_folder(store, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        deliver_artifact(model(store, "one"), tmp_path / "out", store)


def test_files_that_a_user_added_to_a_delivery_are_left_alone(store, tmp_path):
    ref = model(store, "one")
    deliver_artifact(ref, tmp_path / "out", store)
    (tmp_path / "out" / "my_notes.md").write_text("mine")
    with pytest.raises(RecipeError, match=r"my_notes\.md"):
        deliver_artifact(ref, tmp_path / "out", store)
    assert (tmp_path / "out" / "my_notes.md").read_text() == "mine"


@pytest.mark.parametrize("place", ["store", "source", "current folder"])
def test_no_delivery_takes_the_place_of_what_must_not_vanish(store, tmp_path, monkeypatch, place):
    (tmp_path / "sources" / "expert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sources" if place == "current folder" else tmp_path.parent)
    out = {"store": store.root, "source": tmp_path / "sources", "current folder": tmp_path / "sources"}[place]
    protected = [store.root, tmp_path / "sources" / "expert"]
    with pytest.raises(RecipeError, match="is or contains"):
        check_replaceable(out, "merged", True, protected=protected)


def test_a_symbolic_link_is_followed_and_kept(store, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    deliver_artifact(model(store, "one"), tmp_path / "link", store)
    deliver_artifact(model(store, "one"), tmp_path / "link", store)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").read_text() == "one"


def test_an_earlier_delivery_comes_back_when_the_exchange_was_killed(store, tmp_path):
    ref = model(store, "one")
    deliver_artifact(ref, tmp_path / "out", store)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(RecipeError, match="another artifact"):
        deliver_artifact(model(store, "two"), tmp_path / "out", store)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "one"


def test_two_deliveries_to_one_place_never_mix(store, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    refs = [model(store, text) for text in ("one", "two")] * 8
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ref: deliver_artifact(ref, tmp_path / "out", store, replace=True), refs))
    held = json.loads((tmp_path / "out" / "manifest.json").read_text())["digest"]
    assert listing(tmp_path / "out") == listing(store.root / "merged" / held)
