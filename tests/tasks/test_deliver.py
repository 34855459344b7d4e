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
    with pytest.raises(RecipeError, match="another merged model"):
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
    with pytest.raises(RecipeError, match="another kind"):
        check_replaceable(tmp_path / "out", "report", False)


def test_a_file_is_no_place_for_a_folder(store, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        deliver_artifact(model(store, "one"), tmp_path / "out", store)
