import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import random_update, relative, rng

from merging_core.spectral import RELATIVE_FLOOR, Spectrum, combine, leading_triplets, orthogonalised

SHAPES = [(12, 12), (30, 12), (12, 30), (1, 9), (9, 1), (1, 1), (2, 64)]


def dense(spectrum):
    return (spectrum.left * spectrum.spectrum) @ spectrum.right_t


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_triplets_recompose_the_matrix(shape, dtype):
    update = random_update(*shape, dtype=dtype)
    assert relative(dense(leading_triplets(update, min(shape))), update) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_triplets_agree_with_a_dense_svd(shape, fraction):
    rank = max(1, int(fraction * min(shape)))
    update = random_update(*shape)
    found = leading_triplets(update, rank)
    u, s, vt = np.linalg.svd(update.numpy(), full_matrices=False)
    assert found.rank == rank
    assert found.left.shape == (shape[0], rank)
    assert found.right_t.shape == (rank, shape[1])
    np.testing.assert_allclose(found.spectrum.numpy(), s[:rank], rtol=1e-9)
    np.testing.assert_allclose(dense(found).numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_are_orthonormal_and_descending(shape):
    found = leading_triplets(random_update(*shape), min(shape))
    eye = torch.eye(found.rank, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.right_t @ found.right_t.T, eye, atol=1e-8, rtol=0)
    assert (found.spectrum.diff() <= 0).all()
    assert (found.spectrum > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_matrix_has_no_directions(shape):
    found = leading_triplets(torch.zeros(shape), min(shape))
    assert found.rank == 0
    assert dense(found).shape == shape


def test_rank_zero_is_an_empty_spectrum():
    assert leading_triplets(random_update(5, 4), 0).rank == 0


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_a_low_rank_matrix_has_as_many_directions_as_its_rank(shape, rank):
    update = random_update(shape[0], rank) @ random_update(rank, shape[1], seed=1)
    found = leading_triplets(update, min(shape))
    assert found.rank == rank
    assert relative(dense(found), update) < 1e-9


def test_directions_at_the_floor_are_noise_and_directions_above_are_kept():
    update = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert leading_triplets(update, 3, floor=1.0).spectrum.tolist() == [4, 2]
    assert leading_triplets(update, 3, floor=0.999).spectrum.tolist() == [4, 2, 1]
    assert leading_triplets(update, 3, floor=5).rank == 0


def test_directions_below_the_relative_floor_are_dropped():
    update = torch.diag(torch.tensor([1.0, 2 * RELATIVE_FLOOR, RELATIVE_FLOOR / 2], dtype=torch.float64))
    assert leading_triplets(update, 3).rank == 2


@pytest.mark.parametrize("power", [-300, -30, 0, 30, 300])
def test_scaling_a_matrix_scales_its_spectrum_and_nothing_else(power):
    update = random_update(8, 11)
    found, scaled = leading_triplets(update, 5), leading_triplets(update * 2.0**power, 5)
    torch.testing.assert_close(scaled.spectrum, found.spectrum * 2.0**power, rtol=1e-12, atol=0)
    assert relative(dense(scaled), dense(found) * 2.0**power) < 1e-10


def test_truncation_keeps_the_leading_directions():
    found = leading_triplets(random_update(8, 11), 6)
    assert torch.equal(found.truncated(2).spectrum, found.spectrum[:2])
    assert torch.equal(found.truncated(2).left, found.left[:, :2])
    assert found.truncated(99).rank == 6
    assert found.truncated(0).rank == 0


# Polar factors


@pytest.mark.parametrize(("rows", "cols"), [(12, 12), (30, 12), (5, 1), (1, 1)])
def test_the_polar_factor_is_the_one_of_a_dense_svd(rows, cols):
    basis = random_update(rows, cols)
    factor, num_null = orthogonalised(basis)
    u, _, vt = np.linalg.svd(basis.numpy(), full_matrices=False)
    assert num_null == 0
    np.testing.assert_allclose(factor.numpy(), u @ vt, atol=1e-8)


def test_an_orthonormal_basis_stays_as_it_is():
    basis = torch.linalg.qr(random_update(20, 7)).Q
    torch.testing.assert_close(orthogonalised(basis)[0], basis, atol=1e-12, rtol=0)


@pytest.mark.parametrize("copies", [2, 3])
def test_repeated_columns_are_null_directions(copies):
    basis = torch.linalg.qr(random_update(20, 5)).Q
    factor, num_null = orthogonalised(torch.cat([basis] * copies, dim=1))
    assert num_null == 5 * (copies - 1)
    torch.testing.assert_close(factor, torch.cat([basis] * copies, dim=1) / math.sqrt(copies), atol=1e-9, rtol=0)


def test_an_empty_basis_has_an_empty_factor():
    factor, num_null = orthogonalised(torch.zeros(6, 0))
    assert factor.shape == (6, 0)
    assert num_null == 0


def test_a_zero_basis_is_all_null():
    factor, num_null = orthogonalised(torch.zeros(6, 3))
    assert num_null == 3
    assert not factor.any()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_the_polar_factor_is_a_partial_isometry(rows, cols, seed):
    basis = random_update(rows, min(rows, cols), seed)
    factor, num_null = orthogonalised(basis)
    values = torch.linalg.svdvals(factor)
    assert int((values > 0.5).sum()) == min(rows, cols) - num_null
    assert ((values < 1e-4) | ((values - 1).abs() < 1e-4)).all()


# Combination


def experts(shape, rank, number, **options):
    return [leading_triplets(random_update(*shape, seed=seed), rank, **options) for seed in range(number)]


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_merged_spectrum_is_the_kept_singular_values(shape, number):
    spectra = experts(shape, 24 // number, number)
    combined = combine(spectra, [1.0] * number)
    kept = torch.cat([part.spectrum for part in spectra]).sort(descending=True).values
    assert combined.num_null == 0
    torch.testing.assert_close(torch.linalg.svdvals(combined.update)[: len(kept)], kept, rtol=1e-6, atol=1e-9)


def test_weights_multiply_the_kept_singular_values():
    spectra = experts((24, 30), 8, 3)
    weights = (0.5, 2.0, 1.25)
    kept = torch.cat([part.spectrum * weight for part, weight in zip(spectra, weights, strict=True)])
    found = torch.linalg.svdvals(combine(spectra, weights).update)
    torch.testing.assert_close(found, kept.sort(descending=True).values, rtol=1e-6, atol=1e-9)


def test_experts_may_keep_different_numbers_of_directions():
    spectra = [leading_triplets(random_update(24, 30, seed), rank) for seed, rank in enumerate((3, 0, 11))]
    kept = torch.cat([part.spectrum for part in spectra]).sort(descending=True).values
    found = torch.linalg.svdvals(combine(spectra, [1.0] * 3).update)
    torch.testing.assert_close(found[:14], kept, rtol=1e-6, atol=1e-9)
    assert found[14:].max() < 1e-9


def test_no_directions_at_all_give_a_zero_update():
    spectra = [leading_triplets(torch.zeros(5, 4), 2) for _ in range(3)]
    combined = combine(spectra, [1.0] * 3)
    assert combined.update.shape == (5, 4)
    assert not combined.update.any()
    assert combined.num_null == 0


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)])
def test_identical_experts_give_one_of_them_whatever_the_signs_of_their_vectors(signs):
    part = leading_triplets(random_update(18, 24), 6)
    spectra = [Spectrum(sign * part.left, part.spectrum, sign * part.right_t) for sign in signs]
    combined = combine(spectra, [1.0] * 3)
    assert relative(combined.update, dense(part)) < 1e-9
    assert combined.num_null == 2 * 12


def test_opposite_experts_cancel():
    part = leading_triplets(random_update(18, 24), 6)
    opposite = Spectrum(-part.left, part.spectrum, part.right_t)
    assert combine([part, opposite], [1.0, 1.0]).update.norm() < 1e-9 * part.spectrum.norm()


def test_disjoint_directions_are_summed():
    left, right = torch.linalg.qr(random_update(20, 6)).Q, torch.linalg.qr(random_update(15, 6, seed=1)).Q
    values = torch.tensor([5.0, 4, 3, 2, 1, 0.5], dtype=torch.float64)
    parts = [Spectrum(left[:, at], values[at], right[:, at].T) for at in (slice(0, 3), slice(3, 6))]
    assert relative(combine(parts, [1.0, 1.0]).update, (left * values) @ right.T) < 1e-12


def test_combination_depends_on_subspaces_not_on_the_vectors_chosen():
    """Equal singular values leave the vectors free to rotate; the merge must not see that."""
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=rng(5), dtype=torch.float64)).Q
    left, right = torch.linalg.qr(random_update(16, 4)).Q, torch.linalg.qr(random_update(20, 4, seed=1)).Q
    flat = torch.ones(4, dtype=torch.float64)
    other = leading_triplets(random_update(16, 20, seed=2), 4)
    one = combine([Spectrum(left, flat, right.T), other], [1.0, 1.0]).update
    two = combine([Spectrum(left @ rotation, flat, (right @ rotation).T), other], [1.0, 1.0]).update
    assert relative(one, two) < 1e-10
