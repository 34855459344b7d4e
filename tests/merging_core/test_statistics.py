import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import FLOATS, random_update, rng

from merging_core.statistics import StatisticsSettings, measure, outlier_mass, rounding_floor, sparsity

AXES = {"matrix": None, "row": 1, "column": 0}


def naive_mass(update, cut, scope):
    magnitude = np.abs(update)
    mean = magnitude.mean(axis=AXES[scope], keepdims=True)
    std = magnitude.std(axis=AXES[scope], keepdims=True)
    return magnitude[magnitude > mean + cut * std].sum()


@pytest.mark.parametrize("scope", AXES)
@pytest.mark.parametrize("cut", [0.0, 0.5, 1.0, 2.5, 3.0])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 50), (50, 1)])
def test_outlier_mass_is_the_formula(scope, cut, shape):
    update = random_update(*shape) ** 3
    assert float(outlier_mass(update, cut, scope)) == pytest.approx(naive_mass(update.numpy(), cut, scope), rel=1e-12)


def test_scopes_differ_where_one_row_is_louder():
    update = torch.ones(4, 5)
    update[2] = 100
    assert float(outlier_mass(update, 1.0, "matrix")) == 500
    assert float(outlier_mass(update, 1.0, "row")) == 0
    assert float(outlier_mass(update, 1.0, "column")) == 500


@pytest.mark.parametrize("scope", AXES)
@pytest.mark.parametrize("cut", [0.0, 1e-3, 3.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_update_has_no_outliers(scope, cut, dtype):
    draw = rng(3)
    for _ in range(60):
        rows, cols = torch.randint(1, 60, (2,), generator=draw).tolist()
        constant = torch.randn((), generator=draw, dtype=torch.float64).to(dtype)
        assert float(outlier_mass(torch.full((rows, cols), constant.item(), dtype=dtype), cut, scope)) == 0


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 40), st.integers(1, 40))
def test_no_constant_has_outliers(constant, rows, cols):
    assert float(outlier_mass(torch.full((rows, cols), constant), 0.0)) == 0


def test_a_single_entry_has_no_outliers():
    assert float(outlier_mass(torch.ones(1, 1), 0.0)) == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("scope", AXES)
def test_an_empty_update_has_no_outliers_and_is_all_zero(shape, scope):
    assert float(outlier_mass(torch.zeros(shape), 3.0, scope)) == 0
    assert sparsity(torch.zeros(shape), 0.1) == 1
    assert rounding_floor(torch.zeros(shape)) == 0


def test_an_entry_on_the_limit_is_not_an_outlier():
    """Magnitudes 0, 2: mean 1, std 1; 2 lies exactly one standard deviation away."""
    assert float(outlier_mass(torch.tensor([[0.0, 2.0]]), 1.0)) == 0
    assert float(outlier_mass(torch.tensor([[0.0, 2.0]]), 0.999)) == 2


def test_signs_do_not_matter():
    update = random_update(20, 20)
    assert measure(update, StatisticsSettings()) == measure(-update, StatisticsSettings())


@pytest.mark.parametrize("near_zero", [0.0, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(40, 60), (1, 50)])
def test_sparsity_is_the_formula(near_zero, shape):
    update = random_update(*shape)
    update[update.abs() < 0.05] = 0
    magnitude = np.abs(update.numpy())
    wanted = (magnitude <= near_zero * math.sqrt((magnitude**2).mean())).mean()
    assert sparsity(update, near_zero) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("near_zero", [0.0, 0.1])
def test_a_zero_update_is_all_zero(near_zero):
    assert sparsity(torch.zeros(3, 4), near_zero) == 1


def test_near_zero_of_zero_counts_exact_zeros():
    assert sparsity(torch.tensor([[0.0, -0.0, 1e-30, 1.0]]), 0.0) == 0.5


@given(st.integers(-40, 40))
def test_scaling_an_update_scales_norm_and_mass_and_leaves_sparsity(power):
    update = random_update(15, 20)
    settings = StatisticsSettings(cut=1.0)
    one, two = measure(update, settings), measure(update * 2.0**power, settings)
    assert two.norm == pytest.approx(one.norm * 2.0**power, rel=1e-12)
    assert two.outlier_mass == pytest.approx(one.outlier_mass * 2.0**power, rel=1e-12)
    assert two.sparsity == one.sparsity


def test_the_norm_is_taken_in_float64():
    update = torch.full((3, 3), 1e30)
    assert measure(update, StatisticsSettings()).norm == pytest.approx(3e30, rel=1e-6)


# The rounding floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 64)])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_floor_is_the_edge_of_simulated_rounding(dtype, shape, std):
    exact = random_update(*shape) * std
    stored = exact.to(dtype)
    largest = float(torch.linalg.matrix_norm(stored.to(torch.float64) - exact, ord=2))
    floor = rounding_floor(stored)
    assert largest <= floor <= 1.25 * largest


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_floor_of_a_constant_follows_from_its_last_place(dtype):
    for value, ulp in ((1.0, 1.0), (1.5, 1.0), (2.0, 2.0), (0.5, 0.5), (-1.0, 1.0)):
        step = ulp * torch.finfo(dtype).eps
        found = rounding_floor(torch.full((9, 16), value, dtype=dtype))
        assert found == pytest.approx(1.1 * step / math.sqrt(12) * (3 + 4), rel=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_round_exactly(dtype):
    assert rounding_floor(torch.zeros(4, 4, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_the_floor_knows_eight_bit_floats(dtype):
    assert rounding_floor(torch.ones(4, 4).to(dtype)) > 0.05
    assert rounding_floor(torch.zeros(4, 4).to(dtype)) == 0


@pytest.mark.parametrize("delta_std", [2e-3, 5e-4])
def test_a_low_rank_update_stored_in_bfloat16_shows_its_rank(delta_std):
    """The case of facts/merge_methods.md 3.1, smaller: rank 8 within 256 x 384, weights of standard deviation 0.02."""
    from merging_core.spectral import leading_triplets

    base = (random_update(256, 384) * 0.02).to(torch.bfloat16)
    update = random_update(256, 8, seed=1) @ random_update(8, 384, seed=2)
    update *= delta_std / update.std()
    stored = (base.to(torch.float64) + update).to(torch.bfloat16)
    found = leading_triplets(stored.to(torch.float64) - base.to(torch.float64), 128, rounding_floor(stored))
    assert found.rank == 8
