"""The folder of a served model: pinned by content, and never taken for a checkpoint."""

import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks.publish import publish
from tasks.sources import resolve
from tasks.sources.tokenizer import tokenizer_step
from tasks.vectors import require_compatible


def test_equal_tokenizers_are_one_artifact_wherever_they_lie_and_weights_do_not_count(family, store):
    with_weights, other = tokenizer_step(str(family["base"])), tokenizer_step(str(family["honest"]))
    assert with_weights.ref == other.ref
    (family["honest"] / "model.safetensors").unlink()
    assert tokenizer_step(str(family["honest"])).ref == other.ref
    (family["honest"] / "config.json").write_text("{}")
    assert tokenizer_step(str(family["honest"])).ref != other.ref


def test_what_was_pinned_stays_when_the_folder_changes(family, store):
    before = (family["base"] / "tokenizer.json").read_bytes()
    step = tokenizer_step(str(family["base"]))
    (family["base"] / "tokenizer.json").write_text("{}")
    folder = store.folder(step.build(store).ref)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert not list(folder.glob("*.safetensors"))


def test_it_is_no_checkpoint_and_cannot_be_merged_or_published(family, store, tmp_path):
    pinned = tokenizer_step(str(family["base"])).build(store).ref
    expert = resolve(str(family["honest"]), store).ref
    assert pinned.digest != resolve(str(family["base"]), store).ref.digest
    with pytest.raises(CheckpointError, match=r"the base: .*/tokenizer/\w+ holds no model.safetensors"):
        require_compatible(pinned, {"honest": expert}, store)
    with pytest.raises(CheckpointError, match=r"expert 'honest': .*/tokenizer/\w+ holds no model.safetensors"):
        require_compatible(expert, {"honest": pinned}, store)
    with pytest.raises(RecipeError, match="not a model"):
        publish(pinned, str(tmp_path / "published"), store)
