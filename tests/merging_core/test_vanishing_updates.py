"""Small, sparse and cancelling inputs: nothing vanishes, and nothing is taken for something else, silently."""

import pytest
import torch
from tiny_checkpoints import Merge, llama, merged, random_update, rng, tuned

from merging_core.errors import RecipeError
from merging_core.methods import Linear, Tsvm


def moved_by_one_unit(base, share, seed):
    """Reinforcement learning at a small rate, stored in bfloat16: few weights change, by one unit in the last place."""
    draw = rng(seed)
    chosen = torch.rand(base.shape, generator=draw) < share
    step = torch.where(torch.rand(base.shape, generator=draw) < 0.5, 1, -1)
    return torch.where(chosen, (base.view(torch.int16) + step).to(torch.int16).view(torch.bfloat16), base)


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_sparse_bfloat16_updates_are_not_taken_for_rounding_noise(share):
    """The floor counts the rounding of weights that did not change; all directions of all experts are dropped."""
    base = (random_update(64, 96) * 0.02).to(torch.bfloat16)
    experts = [{"w": moved_by_one_unit(base, share, seed)} for seed in (1, 2, 3)]
    (found,) = Merge(Tsvm(), {"w": base}, experts, dtype="float32").diagnostics
    assert any(found.ranks.values())


def test_the_mean_of_a_row_is_the_mean_of_the_same_vector():
    """Where a matrix has fewer directions than experts its mean is meant, but the floor has dropped the update."""
    base = torch.ones(1, 64, dtype=torch.bfloat16)
    expert = base.clone()
    expert[0, 0] = 1 + 2**-7
    row = merged(Tsvm(), {"w": base}, [{"w": expert}] * 2, dtype="float32")["w"]
    vector = merged(Tsvm(), {"w": base[0]}, [{"w": expert[0]}] * 2, dtype="float32")["w"]
    assert torch.equal(row[0], vector)


def test_linear_refuses_weights_that_sum_to_rounding():
    """0.1 + 0.2 - 0.3 is 5.6e-17, not 0: the merge is larger than the experts by 1e15."""
    with pytest.raises(RecipeError, match="must not sum to 0"):
        merged(Linear(), llama(), [tuned(llama(), seed) for seed in (1, 2, 3)], weights=[0.1, 0.2, -0.3])


@pytest.mark.parametrize("config", [{"vocab_size": 24}, {"model_type": "gemma3", "text_config": {"vocab_size": 24}}])
def test_embeddings_are_known_by_the_vocabulary_size_also_where_it_is_nested(config):
    job = Merge(Tsvm(embeddings="mean"), llama(), [tuned(llama(), 1), tuned(llama(), 2)], config=config)
    assert "model.embed_tokens.weight" not in {found.tensor for found in job.diagnostics}


def test_embeddings_are_not_guessed_where_the_config_does_not_tell():
    with pytest.raises(RecipeError, match="vocab_size"):
        Merge(Tsvm(embeddings="mean"), llama(), [tuned(llama(), 1), tuned(llama(), 2)], config={})
