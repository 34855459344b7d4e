"""Identities, invariances and algebra of the methods, through files: write, decompose, measure, merge, read."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_checkpoints import (
    CONFIG,
    FLOATS,
    NAMES,
    Merge,
    assert_same_bits,
    bits,
    llama,
    merged,
    merged_update,
    random_bits,
    random_update,
    relative,
    rng,
    tuned,
)

from merging_core.errors import CheckpointError
from merging_core.methods import METHODS, Linear, RTsvm, TaskArithmetic, Tsvm
from merging_core.methods.base import SpectralMethod, TensorMethod
from merging_core.statistics import Statistics, StatisticsSettings, outlier_mass, sparsity

SPECTRAL = [Tsvm(), RTsvm(), RTsvm(weighting="uniform"), RTsvm(gamma=0), Tsvm(rank_fraction=0.5)]
ALL = [Linear(), TaskArithmetic(), *SPECTRAL]
MATRIX, WIDE, SQUARE = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def name_of(method):
    return method.name + "".join(
        f",{key}={getattr(method, key)}"
        for key in ("weighting", "gamma", "rank_fraction")
        if getattr(method, key, None) not in (None, getattr(type(method)(), key, None))
    )


every_method = pytest.mark.parametrize("method", ALL, ids=name_of)
spectral_method = pytest.mark.parametrize("method", SPECTRAL, ids=name_of)


def full_rank(shape=(24, 30), number=3):
    return [random_update(*shape, seed=10 + seed) * 0.02 for seed in range(number)]


def truncated(update, rank):
    u, s, vt = np.linalg.svd(update.to(torch.float64).numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])


# Protocols


def test_every_method_is_of_one_kind_and_named_by_its_key():
    for name, method in METHODS.items():
        assert method().name == name
        assert isinstance(method(), TensorMethod) != isinstance(method(), SpectralMethod)


# Linear


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0, 1e-30])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_linear_with_one_expert_is_the_expert_bit_for_bit(dtype, weight, compute_dtype):
    draw = rng(7)
    expert = {"w": random_bits(dtype, (40, 30), draw), "v": random_bits(dtype, (50,), draw)}
    base = {"w": random_bits(dtype, (40, 30), draw), "v": random_bits(dtype, (50,), draw)}
    assert_same_bits(merged(Linear(), base, [expert], weights=[weight], compute_dtype=compute_dtype), expert)


@hypothesis_settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from(FLOATS), st.floats(0.01, 100))
def test_linear_with_one_expert_is_the_expert_for_any_bits_and_weight(seed, dtype, weight):
    expert = {"w": random_bits(dtype, (9, 11), rng(seed))}
    assert_same_bits(merged(Linear(), expert, [expert], weights=[weight]), expert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_linear_of_identical_half_precision_experts_is_the_expert_bit_for_bit(dtype, number):
    expert = {"w": random_bits(dtype, (60, 50), rng(1))}
    # The largest values may round up to infinity on the way, which is an error and not this test's subject.
    expert["w"][expert["w"].abs() > torch.finfo(dtype).max / 8] = -0.0
    assert_same_bits(merged(Linear(), expert, [expert] * number), expert)


def test_linear_of_identical_float32_experts_is_the_expert_when_computed_in_float64():
    expert = {"w": random_bits(torch.float32, (60, 50), rng(1)) * 0.01}
    assert_same_bits(merged(Linear(), expert, [expert] * 3, compute_dtype="float64"), expert)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, 0.5, 0.3), (1, 2, 3), (1, -0.5, 0.75)])
def test_linear_is_the_weighted_mean(normalize, weights):
    base = llama(dtype=torch.float64)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    result = merged(Linear(normalize=normalize), base, experts, weights=weights)
    for name in base:
        if base[name].dtype.is_floating_point:
            wanted = sum(w * expert[name] for w, expert in zip(weights, experts, strict=True))
            wanted = wanted / sum(weights) if normalize else wanted
            torch.testing.assert_close(result[name], wanted, rtol=1e-13, atol=1e-15)


def test_linear_does_not_see_the_base():
    experts = [tuned(llama(), 1), tuned(llama(), 2)]
    other = {name: tensor if name == "model.position_ids" else tensor * 7 for name, tensor in llama().items()}
    assert_same_bits(merged(Linear(), other, experts), merged(Linear(), llama(), experts))


def test_negative_zeros_survive_a_mean():
    expert = {"w": torch.tensor([-0.0, 0.0])}
    assert bits(merged(Linear(), expert, [expert] * 3)["w"]) == bits(expert["w"])


# Task arithmetic


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, -0.5, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_task_arithmetic_is_the_naive_formula(scale, weights, dtype):
    base = llama(dtype=dtype)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    result = merged(TaskArithmetic(scale=scale), base, experts, weights=weights)
    for name in base:
        if base[name].dtype.is_floating_point:
            origin = base[name].double()
            update = sum(w * (expert[name].double() - origin) for w, expert in zip(weights, experts, strict=True))
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(result[name].double(), origin + scale * update, rtol=eps, atol=2 * eps)


def test_task_arithmetic_with_one_expert_at_scale_one_is_the_expert():
    base = {"w": torch.arange(-8.0, 8.0).reshape(4, 4)}
    expert = {"w": base["w"] + 0.5}
    assert_same_bits(merged(TaskArithmetic(), base, [expert]), expert)


# All methods


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [TaskArithmetic, Tsvm, RTsvm])
def test_scale_zero_is_the_base_bit_for_bit(kind, dtype):
    draw = rng(3)
    base = {"w": random_bits(dtype, (30, 20), draw), "v": random_bits(dtype, (50,), draw), "s": torch.tensor(-0.0)}
    # Updates of ordinary size on top of any bits: the base may hold subnormals and values near the limit.
    base["w"] = torch.where(base["w"].abs().double() > torch.finfo(dtype).max / 4, -0.0, base["w"]).to(dtype)
    base["v"] = torch.where(base["v"].abs().double() > torch.finfo(dtype).max / 4, -0.0, base["v"]).to(dtype)
    experts = [tuned(base, seed, scale=1.0) for seed in (1, 2, 3)]
    assert_same_bits(merged(kind(scale=0), base, experts), base)


@pytest.mark.parametrize("method", [TaskArithmetic(), *SPECTRAL], ids=name_of)
@pytest.mark.parametrize("dtype", FLOATS)
def test_untrained_experts_leave_the_base_bit_for_bit(method, dtype):
    base = llama(dtype=dtype) | {"z": torch.full((4, 5), -0.0, dtype=dtype)}
    assert_same_bits(merged(method, base, [base, base, base]), base)


@every_method
def test_expert_order_does_not_change_the_merge(method):
    base = llama()
    experts = {name: tuned(base, seed) for seed, name in enumerate(NAMES[:3], start=1)}
    turned = dict(reversed(experts.items()))
    one = merged(method, base, experts, weights=[0.5, 1.0, 1.5])
    two = merged(method, base, turned, weights=[1.5, 1.0, 0.5])
    for name in base:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


@every_method
def test_order_of_the_mappings_given_does_not_change_a_bit(method):
    base = llama()
    experts = {name: tuned(base, seed) for seed, name in enumerate(NAMES[:3], start=1)}
    turned = {name: dict(reversed(tensors.items())) for name, tensors in experts.items()}
    one = merged(method, base, experts)
    two = merged(method, dict(reversed(base.items())), turned, given_order=["harmless", "helpful", "honest"])
    assert_same_bits(one, two)


@every_method
def test_shard_layout_of_inputs_and_output_does_not_change_a_bit(method):
    base = llama(dtype=torch.bfloat16)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    one = Merge(method, base, experts)
    two = Merge(method, base, experts, shards=4, max_shard_bytes=1000)
    assert len(list(two.out.glob("*.safetensors"))) > 2
    assert_same_bits(two.tensors, one.tensors)
    assert (one.out / "model.safetensors").read_bytes() == (two.again() / "model.safetensors").read_bytes()


@every_method
def test_running_twice_gives_the_same_bytes(method):
    base = llama(dtype=torch.bfloat16)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    one, two = Merge(method, base, experts), Merge(method, base, experts)
    first = (one.out / "model.safetensors").read_bytes()
    assert first == (one.again() / "model.safetensors").read_bytes()
    assert first == (two.out / "model.safetensors").read_bytes()


@every_method
def test_the_global_random_state_is_neither_read_nor_changed(method):
    base = llama()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    merged(method, base, [tuned(base, 1), tuned(base, 2)])
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_every_tensor_is_reported_with_its_bytes(method):
    base = llama(dtype=torch.bfloat16)
    job = Merge(method, base, [tuned(base, 1), tuned(base, 2)])
    assert len(job.progress) == len(base)
    assert sum(job.progress) == sum(len(bits(tensor)) for tensor in job.tensors.values())


@pytest.mark.parametrize("method", [TaskArithmetic(), *SPECTRAL], ids=name_of)
@pytest.mark.parametrize("factor", [2.0, 0.25, 3.0])
def test_scaling_the_updates_scales_the_merged_update(method, factor):
    updates = full_rank()
    one = merged_update(method, updates)
    two = merged_update(method, [factor * update for update in updates])
    assert relative(two, factor * one) < 1e-6


@pytest.mark.parametrize("kind", [TaskArithmetic, Tsvm, RTsvm])
def test_scale_multiplies_the_merged_update(kind):
    updates = full_rank()
    assert relative(merged_update(kind(scale=2.5), updates), 2.5 * merged_update(kind(), updates)) < 1e-12


@pytest.mark.parametrize("kind", [Linear, TaskArithmetic, Tsvm, RTsvm])
def test_integer_buffers_are_copied(kind):
    base = llama() | {
        "mask": torch.tensor([True, False]),
        "counts": torch.tensor([[1, 2], [3, -4]], dtype=torch.int8),
        "phase": torch.tensor([1 + 2j]),
    }
    result = merged(kind(), base, [tuned(base, 1), tuned(base, 2)], dtype="float16")
    for name in ("mask", "counts", "phase", "model.position_ids"):
        assert result[name].dtype == base[name].dtype
        assert bits(result[name]) == bits(base[name])


# TSVM and R-TSVM


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_r_tsvm_with_even_weights_and_zero_gamma_is_tsvm_bit_for_bit(number, dtype):
    base = llama(dtype=dtype)
    experts = [tuned(base, seed) for seed in range(1, number + 1)]
    one = Merge(RTsvm(weighting="uniform", gamma=0, scale=0.7), base, experts)
    two = Merge(Tsvm(scale=0.7), base, experts)
    assert_same_bits(one.tensors, two.tensors)
    assert one.diagnostics == two.diagnostics


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (25, 31)])
@pytest.mark.parametrize("number", [2, 3])
def test_merged_spectrum_is_the_kept_singular_values(shape, number):
    updates = full_rank(shape, number)
    rank = min(shape) // number
    kept = np.concatenate([np.linalg.svd(update.numpy(), compute_uv=False)[:rank] for update in updates])
    found = np.linalg.svd(merged_update(Tsvm(), updates).numpy(), compute_uv=False)
    np.testing.assert_allclose(found[: len(kept)], np.sort(kept)[::-1], rtol=1e-5)
    assert (found[len(kept) :] < 1e-6 * found[0]).all()


@pytest.mark.parametrize("scope", ["matrix", "row", "column"])
def test_merged_spectrum_of_r_tsvm_is_the_kept_singular_values_times_the_weights(scope):
    updates = [update**3 for update in full_rank()]
    method = RTsvm(cut=1.0, scope=scope, gamma=0.8, near_zero=0.2)
    mass = [float(outlier_mass(update, 1.0, scope)) for update in updates]
    share = sum(sparsity(update, 0.2) for update in updates) / 3
    rank = math.floor((1 - 0.8 * share) * 24 / 3 + 0.5)
    kept = np.concatenate(
        [
            3 * own / sum(mass) * np.linalg.svd(update.numpy(), compute_uv=False)[:rank]
            for own, update in zip(mass, updates, strict=True)
        ]
    )
    found = np.linalg.svd(merged_update(method, updates).numpy(), compute_uv=False)
    assert 1 <= rank < 8
    np.testing.assert_allclose(found[: 3 * rank], np.sort(kept)[::-1], rtol=1e-5)
    assert (found[3 * rank :] < 1e-6 * found[0]).all()


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize("method", [Tsvm(), RTsvm(gamma=0)], ids=name_of)
def test_one_expert_at_scale_one_is_the_expert(shape, method):
    update = random_update(*shape)
    assert relative(merged_update(method, [update]), update) < 1e-6


@spectral_method
@pytest.mark.parametrize("number", [2, 3])
def test_identical_experts_give_the_truncated_update(method, number):
    update = random_update(24, 30)
    result = merged_update(method, [update] * number, dtype=torch.float64)
    kept = int(torch.linalg.matrix_rank(result, rtol=1e-5))
    assert 1 <= kept <= 24 // number
    assert relative(result, truncated(update, kept)) < 1e-5


def test_shared_directions_are_reported():
    update = random_update(24, 30)
    job = Merge(Tsvm(), {"w": torch.zeros(24, 30)}, [{"w": update.float()}] * 3)
    (found,) = job.diagnostics
    assert found.tensor == "w"
    assert found.ranks == dict.fromkeys(NAMES[:3], 8)
    assert found.weights == dict.fromkeys(NAMES[:3], 1.0)
    assert found.num_null == 2 * 16


@pytest.mark.parametrize("method", [Tsvm(), RTsvm(gamma=0, weighting="uniform")], ids=name_of)
@pytest.mark.parametrize(("shape", "rank"), [((48, 60), 4), ((64, 64), 8), ((60, 48), 1)])
def test_low_rank_updates_survive_noise(method, shape, rank):
    """The reference moves by 80 % here: it merges arbitrary null-space vectors (facts/merge_methods.md 3.1)."""
    base = random_update(*shape) * 0.02
    updates = [
        random_update(shape[0], rank, seed=1 + seed) @ random_update(rank, shape[1], seed=50 + seed) * 0.01
        for seed in range(3)
    ]
    noisy = [
        update + 1e-6 * update.norm() / math.sqrt(update.numel()) * random_update(*shape, seed=90 + seed)
        for seed, update in enumerate(updates)
    ]
    exact = merged_update(method, updates, base=base)
    assert relative(merged_update(method, noisy, base=base), exact) < 1e-3
    stored = merged_update(method, updates, base=base.float().double(), dtype=torch.float32)
    assert relative(stored, exact) < 1e-3


@spectral_method
@pytest.mark.parametrize(("shape", "number"), [((1, 40), 2), ((40, 1), 3), ((2, 64), 3), ((3, 3), 4), ((1, 1), 2)])
def test_a_matrix_with_fewer_directions_than_experts_gets_the_mean(method, shape, number):
    updates = full_rank(shape, number)
    found = merged_update(type(method)(scale=1.5), updates)
    if method.name == "tsvm" or shape == (1, 1):
        torch.testing.assert_close(found, 1.5 * sum(updates) / number, rtol=1e-5, atol=1e-7)
    else:
        mass = [float(outlier_mass(update, 3.0)) for update in updates]
        factors = [number * own / sum(mass) if sum(mass) else 1.0 for own in mass]
        wanted = 1.5 * sum(factor * update for factor, update in zip(factors, updates, strict=True)) / number
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def many_experts(number):
    updates = [random_update(number - 1, 30, seed) for seed in range(number)]
    base = {"w": torch.zeros(number - 1, 30, dtype=torch.float64)}
    return base, {f"e{seed}": {"w": update} for seed, update in enumerate(updates)}, sum(updates) / number


def test_many_experts_of_a_small_matrix_get_the_mean_from_half_of_the_directions():
    """Sides up to 16 are stored in full."""
    base, experts, mean = many_experts(17)
    found = merged(Tsvm(), base, experts, rank_fraction=0.5)["w"]
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)


def test_a_mean_is_never_taken_over_truncated_updates():
    base, experts, mean = many_experts(20)
    with pytest.raises(CheckpointError, match="stores 16 of 19 directions, 19 are wanted"):
        merged(Tsvm(), base, experts, rank_fraction=0.5)
    torch.testing.assert_close(merged(Tsvm(), base, experts)["w"], mean, rtol=1e-5, atol=1e-6)


@spectral_method
def test_zero_updates_among_others_add_nothing_and_disturb_nothing(method):
    updates = full_rank()
    updates[1] = torch.zeros_like(updates[1])
    result = merged_update(method, updates)
    assert torch.isfinite(result).all()
    if method == Tsvm():
        kept = np.concatenate([np.linalg.svd(updates[at].numpy(), compute_uv=False)[:8] for at in (0, 2)])
        found = np.linalg.svd(result.numpy(), compute_uv=False)
        np.testing.assert_allclose(found[:16], np.sort(kept)[::-1], rtol=1e-5)


@spectral_method
def test_tensors_that_are_not_matrices_get_the_mean_times_the_scale(method):
    base = llama(dtype=torch.float64)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    method = type(method)(scale=0.8)
    result = merged(method, base, experts, weights=[1, 2, 0.5])
    for name in ("model.layers.1.input_layernorm.weight", "model.scalar", "model.conv.weight"):
        update = sum(w * (expert[name] - base[name]) for w, expert in zip((1, 2, 0.5), experts, strict=True)) / 3
        torch.testing.assert_close(result[name], base[name] + 0.8 * update, rtol=1e-6, atol=1e-9)


@spectral_method
def test_a_tensor_is_merged_alike_whatever_else_the_checkpoint_holds(method):
    base = llama()
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    whole = merged(method, base, experts)
    alone = merged(method, {MATRIX: base[MATRIX]}, [{MATRIX: expert[MATRIX]} for expert in experts])
    assert bits(alone[MATRIX]) == bits(whole[MATRIX])


@pytest.mark.parametrize("kind", [Tsvm, RTsvm])
def test_recipe_weights_multiply_the_singular_values(kind):
    updates = full_rank()
    weights = (0.5, 1.0, 2.0)
    method = kind() if kind is Tsvm else RTsvm(gamma=0, weighting="uniform")
    rows = [w * np.linalg.svd(u.numpy(), compute_uv=False)[:8] for w, u in zip(weights, updates, strict=True)]
    found = np.linalg.svd(merged_update(method, updates, weights=weights).numpy(), compute_uv=False)
    np.testing.assert_allclose(found, np.sort(np.concatenate(rows))[::-1], rtol=1e-5)


@pytest.mark.parametrize("kind", [Tsvm, RTsvm])
def test_embeddings_by_the_mean_leave_other_matrices_alone(kind):
    base = llama(dtype=torch.float64)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    spectral, mean = merged(kind(), base, experts), merged(kind(embeddings="mean"), base, experts)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = base[name] + sum(expert[name] - base[name] for expert in experts) / 3
        torch.testing.assert_close(mean[name], wanted, rtol=1e-6, atol=1e-9)
        assert relative(spectral[name] - base[name], wanted - base[name]) > 0.01
    for name in (MATRIX, WIDE, SQUARE):
        assert bits(mean[name]) == bits(spectral[name])


def test_rank_fraction_keeps_that_share_of_directions():
    job = Merge(Tsvm(rank_fraction=0.5), {"w": torch.zeros(24, 30)}, [{"w": u.float()} for u in full_rank()])
    assert job.diagnostics[0].ranks == dict.fromkeys(NAMES[:3], 4)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_half_of_the_directions_are_enough_for_two_or_more_experts(number):
    updates = full_rank((40, 50), number)
    experts = [{"w": update} for update in updates]
    base = {"w": torch.zeros(40, 50, dtype=torch.float64)}
    assert_same_bits(merged(Tsvm(), base, experts, rank_fraction=0.5), merged(Tsvm(), base, experts, rank_fraction=1.0))


@hypothesis_settings(max_examples=25)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 4), st.integers(0, 99), st.sampled_from(SPECTRAL))
def test_any_shape_gives_a_finite_update_no_larger_than_all_together(rows, cols, number, seed, method):
    updates = [random_update(rows, cols, seed + at) for at in range(number)]
    result = merged_update(method, updates)
    assert torch.isfinite(result).all()
    # Outlier weights are at most E, and every kept singular value appears once.
    assert float(result.norm()) <= number * sum(float(update.norm()) for update in updates) * 1.001


# R-TSVM's choice, by hand


def one(outliers, sparse=0.0):
    return Statistics(norm=1.0, outlier_mass=outliers, sparsity=sparse)


def test_weights_follow_the_outlier_mass_and_have_mean_one():
    chosen = RTsvm().choose(12, 3, [one(1.0), one(2.0), one(5.0)])
    assert chosen.weights == (3 / 8, 6 / 8, 15 / 8)
    assert sum(chosen.weights) == 3


def test_weights_are_all_one_without_any_outlier():
    assert RTsvm().choose(12, 3, [one(0.0)] * 3).weights == (1.0, 1.0, 1.0)


def test_uniform_weighting_ignores_outliers():
    assert RTsvm(weighting="uniform").choose(12, 2, [one(1.0), one(5.0)]).weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("gamma", "sparsities", "max_rank", "rank"),
    [
        (0.0, (0.9, 0.9), 10, 5),
        (1.0, (0.0, 0.0), 10, 5),
        (1.0, (0.0, 0.0), 11, 5),  # round(5.5) is 6, more than floor(11 / 2)
        (1.0, (0.5, 0.5), 10, 3),  # 2.5 rounds up
        (1.0, (0.5, 0.5), 14, 4),  # 3.5 rounds up, as 2.5 does
        (1.0, (0.25, 0.75), 12, 3),  # the mean of the experts
        (0.5, (0.5, 0.5), 16, 6),
        (1.0, (1.0, 1.0), 10, 1),  # at least one direction
        (1.0, (1.0, 1.0), 1, 0),  # but none where there are fewer than experts
        (0.0, (0.0, 0.0), 1, 0),
        (1.0, (0.9, 0.9), 2, 1),
    ],
)
def test_rank_falls_with_sparsity(gamma, sparsities, max_rank, rank):
    chosen = RTsvm(gamma=gamma).choose(max_rank, 2, [one(1.0, sparse) for sparse in sparsities])
    assert chosen.rank == rank


@pytest.mark.parametrize(
    ("fraction", "max_rank", "number", "rank"),
    [
        (1.0, 12, 3, 4),
        (1.0, 13, 3, 4),
        (0.5, 13, 3, 2),
        (0.01, 12, 3, 1),
        (1.0, 2, 3, 0),
        (0.5, 1, 1, 1),
        (0.1, 0, 2, 0),
    ],
)
def test_tsvm_shares_the_directions_evenly(fraction, max_rank, number, rank):
    chosen = Tsvm(rank_fraction=fraction).choose(max_rank, number, [])
    assert chosen.rank == rank
    assert chosen.weights == (1.0,) * number


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 50))
def test_rank_stays_between_one_and_an_even_share(gamma, sparsities, max_rank):
    number = len(sparsities)
    rank = RTsvm(gamma=gamma).choose(max_rank, number, [one(1.0, sparse) for sparse in sparsities]).rank
    assert min(1, max_rank // number) <= rank <= max_rank // number


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=6))
def test_weights_have_mean_one_whatever_the_masses(masses):
    weights = RTsvm().choose(9, len(masses), [one(mass) for mass in masses]).weights
    assert math.fsum(weights) == pytest.approx(len(masses))
    assert all(0 <= weight <= len(masses) * (1 + 1e-9) for weight in weights)


def test_r_tsvm_asks_for_the_statistics_of_its_own_settings():
    wanted = StatisticsSettings(cut=2.0, scope="row", near_zero=0.3)
    assert RTsvm(cut=2.0, scope="row", near_zero=0.3).statistics == wanted
    assert Tsvm().statistics is None


# Golden bytes: sums of halves and quarters are exact on every machine


def exact(seed):
    draw = rng(seed)
    return {
        "w": torch.randint(-64, 64, (6, 5), generator=draw).to(torch.bfloat16) / 16,
        "v": torch.randint(-64, 64, (7,), generator=draw).float() / 16,
        "ids": torch.arange(3),
    }


@pytest.mark.parametrize(
    ("method", "digest"),
    [
        (Linear(), "ce00525a6348ff2ba8177bfc7e90d4b8533a592492c3a09ef267ec945c896410"),
        (TaskArithmetic(scale=0.5), "462a4306e1f70726d32f1f5efef8bee545e0d69602a47b04946e634d0112871c"),
    ],
    ids=["linear", "task_arithmetic"],
)
def test_a_refactor_keeps_the_bytes(method, digest):
    """If this fails, merges of the same inputs give other bytes: raise MERGE_VERSION, or undo the change."""
    job = Merge(method, exact(0), [exact(1), exact(2)], weights=[0.25, 0.75], config=CONFIG)
    assert hashlib.sha256((job.out / "model.safetensors").read_bytes()).hexdigest() == digest
