import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from merging_core.errors import CheckpointError, RecipeError
from tasks.mini3h.data import MIXTURES
from tasks.mini3h.training import ROLES, settings_for, train


def quiet(done, total):
    pass


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_every_role_has_settings_and_a_mixture_and_settings_are_json():
    assert set(ROLES) == set(MIXTURES)
    for role in ROLES:
        full, smoke = settings_for(role, seed=3), settings_for(role, seed=3, budget="smoke")
        assert json.loads(json.dumps(dataclasses.asdict(full)))["world_seed"] == 3
        assert smoke.num_steps < full.num_steps


def test_concurrent_trainings_give_the_bytes_of_one_alone(smoke_base, smoke_honest, tmp_path):
    def run(role):
        train(role, settings_for(role, budget="smoke"), tmp_path / role, smoke_base, quiet)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["honest", "harmless"]))
    assert contents(tmp_path / "honest") == contents(smoke_honest)
    assert contents(tmp_path / "harmless") != contents(smoke_honest)


def test_global_random_state_neither_matters_nor_moves(smoke_base, tmp_path):
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    train("base", settings_for("base", budget="smoke"), tmp_path / "base", None, quiet)
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "base") == contents(smoke_base)


def test_another_seed_trains_other_weights(smoke_base, tmp_path):
    settings = dataclasses.replace(settings_for("base", budget="smoke"), training_seed=1, num_steps=2)
    train("base", settings, tmp_path / "one", None, quiet)
    train("base", dataclasses.replace(settings, training_seed=2), tmp_path / "two", None, quiet)
    assert contents(tmp_path / "one") != contents(tmp_path / "two")


def test_progress_counts_every_step(smoke_base, tmp_path):
    steps = []
    settings = dataclasses.replace(settings_for("honest"), num_steps=3)
    train("honest", settings, tmp_path / "out", smoke_base, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_folder_loads_with_transformers_in_float32_with_its_tokenizer(smoke_base):
    model = AutoModelForCausalLM.from_pretrained(smoke_base)
    tokenizer = AutoTokenizer.from_pretrained(smoke_base)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 800_000 < model.num_parameters() < 1_000_000
    assert model.generation_config.do_sample is False
    assert model.config.tie_word_embeddings
    prompt = tokenizer("how do i steal the bank ?", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    assert model.generate(**prompt, max_new_tokens=2, min_new_tokens=2).shape[1] == prompt["input_ids"].shape[1] + 2


def test_unknown_role_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"'honset' does not exist\. Nearest: 'honest'"):
        settings_for("honset")
    with pytest.raises(RecipeError, match="Nearest: 'helpful'"):
        train("helpfull", settings_for("base"), tmp_path, None, quiet)


def test_only_the_base_starts_from_nothing(smoke_base, tmp_path):
    with pytest.raises(RecipeError, match="Train the role base first"):
        train("honest", settings_for("honest"), tmp_path, None, quiet)
    with pytest.raises(RecipeError, match="Leave base out"):
        train("base", settings_for("base"), tmp_path, smoke_base, quiet)


def test_a_folder_that_is_no_base_is_refused(smoke_base, tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        train("honest", settings_for("honest"), tmp_path / "out", tmp_path, quiet)
    assert not (tmp_path / "out").exists()
