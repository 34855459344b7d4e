"""Model Stock, slerp, Karcher, Iso-C, Iso-CTS and WUDI: end points, invariances, spectra, and inputs at the edge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_checkpoints import (
    FLOATS,
    Merge,
    assert_same_bits,
    bits,
    llama,
    merged,
    merged_update,
    random_bits,
    relative,
    rng,
    tuned,
)

from merging_core import sphere
from merging_core.errors import NumericalError, RecipeError
from merging_core.methods import IsoC, IsoCts, Karcher, ModelStock, Site, Slerp, Wudi
from merging_core.methods.wudi import interference_gradient
from merging_core.recipe import Expert, Recipe
from merging_core.updates import noise_floor

ON_UPDATES = [ModelStock(), IsoC(), IsoCts(), Wudi(iterations=5)]
SCALED = [IsoC, IsoCts, Wudi]
ALL = [*ON_UPDATES, Slerp(), Karcher()]
SHAPES = [(24, 30), (30, 24), (16, 16), (1, 9), (9, 1), (1, 1), (7,), (), (2, 3, 4), (0, 5), (5, 0), (0,)]

every_method = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
method_on_updates = pytest.mark.parametrize("method", ON_UPDATES, ids=lambda method: method.name)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def applied(method, base, experts, weights=None):
    """The method itself on one tensor, which must leave its arguments as they are."""
    before = [bits(tensor) for tensor in (base, *experts)]
    site = Site("w", tuple(f"e{at}" for at in range(len(experts))), 0)
    result = method.merge(base, experts, weights or [1.0] * len(experts), site)
    assert [bits(tensor) for tensor in (base, *experts)] == before
    assert result.shape == base.shape
    assert result.dtype == base.dtype
    assert result is not base
    return result


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def points(shape=(24, 30), number=3, dtype=torch.float64):
    return [normal(shape, 20 + seed, dtype) for seed in range(number)]


def numbers(method, at_most=4):
    return [number for number in range(1, at_most + 1) if not (method.name == "slerp" and number > 2)][
        method.name == "model_stock" :
    ]


def spectrum(matrix):
    return np.linalg.svd(matrix.numpy(), compute_uv=False)


def angle(one, two):
    one, two = one.flatten() / one.norm(), two.flatten() / two.norm()
    return 2 * math.atan2(float((one - two).norm()), float((one + two).norm()))


# All of them


@every_method
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_and_number_of_experts_is_finite_and_keeps_shape_and_dtype(method, shape, dtype):
    base = normal(shape, 1, dtype)
    for number in numbers(method):
        assert torch.isfinite(applied(method, base, [base + point for point in points(shape, number, dtype)])).all()


@every_method
@every_shape
def test_zeros_everywhere_give_zeros(method, shape):
    zero = torch.zeros(shape)
    for number in numbers(method):
        assert torch.equal(applied(method, zero, [zero] * number), zero)


@method_on_updates
@pytest.mark.parametrize("dtype", FLOATS)
def test_untrained_experts_leave_the_base_bit_for_bit(method, dtype):
    base = llama(dtype=dtype) | {"z": torch.full((4, 5), -0.0, dtype=dtype)}
    assert_same_bits(merged(method, base, [base, base, base]), base)


@pytest.mark.parametrize("method", [Slerp(), Slerp(t=0.3, straight_above=1), Karcher()], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e3])
def test_identical_checkpoints_are_the_merge(method, scale):
    base = normal((24, 30), 1) * scale
    assert relative(applied(method, base, [base, base]), base) < 1e-15
    half = {"w": base.to(torch.bfloat16)}
    assert_same_bits(merged(method, half, [half, half]), half)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_zero_is_the_base_bit_for_bit(kind, dtype):
    draw = rng(3)
    base = {"w": random_bits(dtype, (30, 20), draw), "v": random_bits(dtype, (50,), draw), "s": torch.tensor(-0.0)}
    for name in ("w", "v"):
        base[name] = torch.where(base[name].abs().double() > 100, -0.0, base[name]).to(dtype)
    experts = [tuned(base, seed, scale=1.0) for seed in (1, 2, 3)]
    method = Wudi(scale=0, iterations=2) if kind is Wudi else kind(scale=0)
    assert_same_bits(merged(method, base, experts), base)


@pytest.mark.parametrize("kind", SCALED)
def test_scale_multiplies_the_merged_update(kind):
    updates = points()
    assert relative(merged_update(kind(scale=2.5), updates), 2.5 * merged_update(kind(), updates)) < 1e-12


@pytest.mark.parametrize("method", [ModelStock(), IsoC(), IsoCts()], ids=lambda method: method.name)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e4])
def test_scaling_the_updates_scales_the_merged_update(method, factor):
    updates = [point + normal((24, 30), 5) for point in points()]
    one = applied(method, torch.zeros(24, 30, dtype=torch.float64), updates)
    two = applied(method, torch.zeros(24, 30, dtype=torch.float64), [factor * update for update in updates])
    assert relative(two, factor * one) < 1e-9


@pytest.mark.parametrize("method", [IsoC(), IsoCts(), Karcher(), ModelStock(), Wudi(iterations=5)], ids=str)
def test_expert_order_does_not_change_the_merge(method):
    base = llama()
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    one = merged(method, base, experts, weights=[0.5, 1.0, 1.5])
    two = merged(method, base, experts[::-1], weights=[1.5, 1.0, 0.5])
    for name in base:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


@every_method
def test_running_twice_and_other_shards_give_the_same_bytes(method):
    base = llama(dtype=torch.bfloat16)
    experts = [tuned(base, 1), tuned(base, 2)]
    one, two = Merge(method, base, experts), Merge(method, base, experts, shards=4)
    assert (one.out / "model.safetensors").read_bytes() == (one.again() / "model.safetensors").read_bytes()
    assert_same_bits(two.tensors, one.tensors)


@every_method
def test_the_global_random_state_is_neither_read_nor_changed(method):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    merged(method, llama(), [tuned(llama(), 1), tuned(llama(), 2)])
    assert torch.equal(torch.get_rng_state(), before)


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_expert_is_named(method, value):
    base = llama()
    experts = [tuned(base, 1), tuned(base, 2)]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"):
        broken = {**experts[1], name: experts[1][name].clone()}
        broken[name].view(-1)[3] = value
        with pytest.raises(NumericalError, match=rf"'{name}': 1 of \d+ entries are NaN or infinite in expert 'honest'"):
            merged(method, base, [experts[0], broken])


@pytest.mark.parametrize("method", [IsoC(scale=0.7), IsoCts(scale=0.7), Wudi(scale=0.7)], ids=lambda one: one.name)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)], ids=str)
def test_tensors_that_are_not_matrices_get_the_weighted_mean_times_the_scale(method, shape):
    base, updates = normal(shape, 1), points(shape)
    wanted = base + 0.7 * (1 * updates[0] + 2 * updates[1] - 0.5 * updates[2]) / 3
    found = applied(method, base, [base + update for update in updates], [1, 2, -0.5])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@method_on_updates
def test_a_weight_is_a_factor_on_the_update(method):
    base, updates, weights = normal((12, 20), 1), points((12, 20)), [0.5, -2.0, 3.0]
    one = applied(method, base, [base + update for update in updates], weights)
    two = applied(method, base, [base + weight * update for weight, update in zip(weights, updates, strict=True)])
    assert relative(one - base, two - base) < 1e-9 or float((two - base).norm()) == 0 == float((one - base).norm())


@every_method
def test_whole_number_settings_are_whole(method):
    for name in ("iterations", "max_iterations"):
        if hasattr(method, name):
            with pytest.raises(RecipeError, match=f"{method.name}: {name} must be a whole number, got 2.5"):
                type(method)(**{name: 2.5})
            assert getattr(type(method)(**{name: 3}), name) == 3


# Inner products


def test_inner_products_are_the_naive_ones_over_several_blocks(monkeypatch):
    monkeypatch.setattr(sphere, "_BLOCK", 7)
    origin, *given_points = (tensor.to(torch.float32) for tensor in points((5, 9), 4))
    flat = torch.stack([point.flatten().double() for point in given_points])
    torch.testing.assert_close(sphere.inner_products(given_points), flat @ flat.T)
    moved = flat - origin.flatten().double()
    torch.testing.assert_close(sphere.inner_products(given_points, origin), moved @ moved.T)


# Model Stock


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_model_stock_of_identical_experts_is_the_expert_at_any_scale(size, number):
    base = torch.zeros(2048, dtype=torch.float64)
    expert = normal((2048,), 1) * size / math.sqrt(2048)
    assert relative(applied(ModelStock(), base, [expert] * number), expert) < 1e-14


@pytest.mark.parametrize("number", [2, 3])
def test_model_stock_of_orthogonal_experts_is_the_base(number):
    base = normal((4, 4), 1)
    updates = torch.eye(16, dtype=torch.float64).reshape(16, 4, 4)[:number]
    experts = [base + 0.25 * update for update in updates]
    found = applied(ModelStock(), base.round(decimals=1), [base.round(decimals=1) + 0.25 * u for u in updates])
    assert relative(found, base.round(decimals=1)) < 1e-15
    assert relative(applied(ModelStock(), base, experts), base) < 1e-14


@hypothesis_settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(-0.3, 1))
def test_model_stock_is_the_formula_between_base_and_mean(seed, number, shared):
    base, common = normal((6, 7), seed), normal((6, 7), seed + 1)
    experts = [base + shared * common + (1 - abs(shared)) * normal((6, 7), seed + 2 + at) for at in range(number)]
    updates = [expert - base for expert in experts]
    pairs = [
        float((updates[i] * updates[j]).sum() / updates[i].norm() / updates[j].norm())
        for i in range(number)
        for j in range(i)
    ]
    cosine = sum(pairs) / len(pairs)
    ratio = max(0.0, number * cosine / (1 + (number - 1) * cosine)) if cosine > 0 else 0.0
    assert 0 <= ratio <= 1 + 1e-12
    wanted = ratio * sum(experts) / number + (1 - ratio) * base
    torch.testing.assert_close(applied(ModelStock(), base, experts), wanted, rtol=1e-9, atol=1e-12)


def test_model_stock_of_opposite_experts_is_the_base_bit_for_bit():
    base = torch.full((4, 5), -0.0)
    update = normal((4, 5), 1, torch.float32)
    assert bits(applied(ModelStock(), base, [update, -update])) == bits(base)


def test_model_stock_counts_an_expert_that_did_not_move_as_orthogonal():
    update = normal((4, 5), 1)
    zero = torch.zeros_like(update)
    # c = 1/3 of the pairs, t = 3 c / (1 + 2 c).
    assert relative(applied(ModelStock(), zero, [update, update, zero]), 0.6 * 2 / 3 * update) < 1e-14
    assert relative(applied(ModelStock(), zero, [update] * 3, [1, 1, 0]), 0.6 * 2 / 3 * update) < 1e-14


# Slerp


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("straight_above", [0.0, 0.9995, 1.0])
def test_slerp_ends_are_the_inputs_bit_for_bit(dtype, straight_above):
    draw = rng(5)
    base, expert = ({"w": random_bits(dtype, (9, 11), draw)} for _ in range(2))
    # Beyond 1e18 the squares of float32 values that bfloat16 can hold still fit; the test is about bits, not range.
    for tensors in (base, expert):
        tensors["w"][tensors["w"].abs().double() > 1e18] = -0.0
    start, end = (Slerp(t=t, straight_above=straight_above) for t in (0, 1))
    assert_same_bits(merged(start, base, [expert]), base)
    assert_same_bits(merged(end, base, [expert]), expert)
    third = {"w": random_bits(dtype, (9, 11), draw)}
    assert_same_bits(merged(start, third, [base, expert]), base)
    assert_same_bits(merged(end, third, [base, expert]), expert)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_of_equal_norms_stays_on_the_sphere_at_its_share_of_the_angle(t):
    one, two = (point / point.norm() for point in points(number=2))
    found = applied(Slerp(t=t), one, [two])
    assert float(found.norm()) == pytest.approx(1, rel=1e-12)
    assert angle(one, found) == pytest.approx(t * angle(one, two), abs=1e-9)


def test_slerp_turned_round_is_the_same():
    one, two = points(number=2)
    torch.testing.assert_close(applied(Slerp(t=0.3), one, [two]), applied(Slerp(t=0.7), two, [one]))


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4, 1e-7, 1e-9, 1e-12, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("straight_above", [0.9995, 1.0])
def test_slerp_of_nearly_parallel_and_opposite_tensors_is_finite(distance, sign, straight_above):
    one, other = points(number=2)
    found = applied(Slerp(t=0.3, straight_above=straight_above), one, [sign * one + distance * other])
    assert torch.isfinite(found).all()
    if sign > 0:
        assert relative(found, one + 0.3 * distance * other) < max(1e-12, distance**2)
    elif straight_above < 1 and distance < 1e-2:
        assert relative(found, 0.4 * one) < 2 * distance + 1e-12


def test_the_straight_line_is_near_the_circle_where_it_replaces_it():
    one, other = points(number=2)
    two = one + math.tan(math.acos(0.9996)) * one.norm() * (other / other.norm())
    line, circle = (applied(Slerp(straight_above=cut), one, [two]) for cut in (0.9995, 1.0))
    assert 0 < relative(line, circle) < 1.5e-4


def test_slerp_from_or_to_zero_is_straight():
    (point,) = points(number=1)
    zero = torch.zeros_like(point)
    assert torch.equal(applied(Slerp(t=0.25), zero, [point]), 0.25 * point)
    assert torch.equal(applied(Slerp(t=0.25), point, [zero]), 0.75 * point)


@pytest.mark.parametrize(
    ("t", "weights", "position"),
    [(0.5, [1, 3], 0.75), (0.5, [3], 0.75), (0.25, [1, 1], 0.25), (0.2, [2, 8], 0.5), (0.5, [0, 2], 1), (0.5, [0], 0)],
)
def test_slerp_weights_are_odds(t, weights, position):
    assert Slerp(t=t).position(weights) == pytest.approx(position)
    base, *experts = points(number=1 + len(weights))
    wanted = applied(Slerp(t=position), base, experts)
    torch.testing.assert_close(applied(Slerp(t=t), base, experts, weights), wanted)


# Karcher


def test_karcher_of_two_is_the_point_of_the_great_circle_at_the_mean_norm():
    one, two = points(number=2)
    two = 3 * two
    for share in (0.0, 0.25, 0.5, 0.8, 1.0):
        found = applied(Karcher(), one, [one, two], [1 - share, share])
        direction = applied(Slerp(t=share), one / one.norm(), [two / two.norm()])
        assert relative(found, direction * ((1 - share) * one.norm() + share * two.norm())) < 1e-9


@hypothesis_settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 5), st.floats(0.01, 2))
def test_karcher_is_where_the_weighted_directions_balance(seed, number, spread):
    common = normal((5, 6), seed)
    experts = [common + spread * normal((5, 6), seed + 1 + at) for at in range(number)]
    weights = [1.0 + at for at in range(number)]
    found = applied(Karcher(max_iterations=100, tolerance=1e-12), common, experts, weights)
    norms = [float(expert.norm()) for expert in experts]
    mean = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / sum(weights)
    assert float(found.norm()) == pytest.approx(mean, rel=1e-9)
    unit = found / found.norm()
    pull = torch.zeros_like(unit)
    for weight, expert in zip(weights, experts, strict=True):
        point = expert / expert.norm()
        tangent = point - float((point * unit).sum()) * unit
        if float(tangent.norm()) > 1e-12:
            pull += weight * angle(point, unit) * tangent / tangent.norm()
    assert float(pull.norm()) < 1e-6 * sum(weights)


def test_karcher_does_not_see_the_base():
    experts = points()
    assert torch.equal(applied(Karcher(), experts[0] * 7, experts), applied(Karcher(), -experts[1], experts))


def test_karcher_weights_are_masses_whose_scale_does_not_matter():
    experts = points()
    doubled = applied(Karcher(tolerance=1e-12, max_iterations=50), experts[0], experts, [2, 1, 0])
    copied = applied(
        Karcher(tolerance=1e-12, max_iterations=50), experts[0], [experts[0], experts[0], experts[1]], [5, 5, 5]
    )
    torch.testing.assert_close(doubled, copied, rtol=1e-9, atol=1e-9)


def test_karcher_of_opposite_experts_is_finite_and_one_of_them():
    one, two = points(number=2)
    assert relative(applied(Karcher(), one, [-one, one]), -one) < 1e-14
    assert relative(applied(Karcher(), one, [-one, one], [1, 2]), one) < 1e-9
    assert torch.isfinite(applied(Karcher(), one, [one, -one, two, -two])).all()


def test_karcher_counts_a_zero_expert_for_the_norm_alone():
    (one,) = points(number=1)
    assert relative(applied(Karcher(), one, [one, torch.zeros_like(one), one]), one * 2 / 3) < 1e-14
    assert relative(applied(Karcher(), one, [one, 1e-30 * one]), one / 2) < 1e-14


def test_karcher_without_steps_is_the_mean_of_the_directions():
    experts = points()
    found = applied(Karcher(max_iterations=0), experts[0], experts)
    mean = sum(expert / expert.norm() for expert in experts)
    assert angle(found, mean) < 1e-7


# Iso-C and Iso-CTS


@pytest.mark.parametrize("method", [IsoC(), IsoCts(), IsoCts(common_fraction=0.4)], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (25, 31), (3, 9), (1, 9)], ids=str)
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_an_isotropic_merge_has_one_singular_value(method, shape, number):
    updates = points(shape, number)
    found = spectrum(merged_update(method, updates))
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    if method.name == "iso_c":
        np.testing.assert_allclose(found[0], spectrum(sum(updates)).mean(), rtol=1e-9)


@pytest.mark.parametrize("shape", [(24, 30), (30, 24)], ids=str)
def test_iso_c_is_the_even_sum(shape):
    updates, weights = points(shape), [0.5, -1, 2]
    u, s, vt = np.linalg.svd(sum(w * d for w, d in zip(weights, updates, strict=True)).numpy(), full_matrices=False)
    found = merged_update(IsoC(scale=0.3), updates, weights=weights)
    assert relative(found, torch.from_numpy(0.3 * s.mean() * u @ vt)) < 1e-9


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (31, 31)], ids=str)
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_iso_cts_is_the_naive_formula(shape, number):
    updates = [update.numpy() for update in points(shape, number)]
    side = min(shape)
    own = round((side - int(side * 0.8)) / number)
    u, s, vt = np.linalg.svd(sum(updates), full_matrices=False)
    u, s, vt = (
        part[..., : side - number * own] if part is not vt else vt[: side - number * own] for part in (u, s, vt)
    )
    parts = [(u, s, vt)]
    for update in updates:
        p, q, rt = np.linalg.svd(update - u @ u.T @ update, full_matrices=False)
        parts.append((p[:, :own], q[:own], rt[:own]))
    left, values, right_t = (
        np.concatenate(found, axis) for found, axis in zip(zip(*parts, strict=True), (1, 0, 0), strict=True)
    )

    def polar(basis):
        p, _, rt = np.linalg.svd(basis, full_matrices=False)
        return p @ rt

    wanted = torch.from_numpy(values.mean() * polar(left) @ polar(right_t))
    assert relative(merged_update(IsoCts(), [torch.from_numpy(update) for update in updates]), wanted) < 1e-8


def test_iso_cts_with_nothing_of_their_own_is_iso_c():
    updates = points()
    assert relative(merged_update(IsoCts(common_fraction=1), updates), merged_update(IsoC(), updates)) < 1e-9


@hypothesis_settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 12), st.floats(0, 1))
def test_iso_cts_shares_out_all_directions(max_rank, number, fraction):
    common, own = IsoCts(common_fraction=fraction).split(max_rank, number)
    assert common >= 0
    assert own >= 0
    assert common + number * own == max_rank


@pytest.mark.parametrize(("fraction", "number", "wanted"), [(0.8, 3, (79, 7)), (0.8, 8, (84, 2)), (0.0, 3, (1, 33))])
def test_iso_cts_sizes_are_those_of_the_reference(fraction, number, wanted):
    assert IsoCts(common_fraction=fraction).split(100, number) == wanted


@pytest.mark.parametrize("method", [IsoC(), IsoCts()], ids=lambda method: method.name)
@pytest.mark.parametrize(("rank", "number"), [(1, 1), (2, 3), (4, 3), (0, 2)])
@pytest.mark.parametrize("shape", [(48, 60), (60, 48)], ids=str)
def test_rank_deficient_sums_are_even_over_the_directions_that_exist(method, rank, number, shape):
    updates = [normal((shape[0], rank), 30 + at) @ normal((rank, shape[1]), 60 + at) for at in range(number)]
    found = spectrum(merged_update(method, updates))
    total = rank * number
    np.testing.assert_allclose(found[:total], spectrum(sum(updates))[:total].mean() if total else [], rtol=1e-6)
    assert (found[total:] <= 1e-9 * found[0]).all()


@pytest.mark.parametrize("method", [IsoC(), IsoCts()], ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("widened", [False, True])
def test_rounding_of_the_stored_dtype_is_no_direction(method, dtype, widened):
    """An even spectrum would lift the noise of a low-rank expert stored in bfloat16 to full size."""
    base = (normal((128, 160), 1) * 0.02).to(dtype)
    updates = [normal((128, 4), 30 + at) @ normal((4, 160), 60 + at) * 0.002 for at in range(3)]
    stored = torch.float32 if widened else dtype
    tensors = [{"w": tensor.to(dtype).to(stored)} for tensor in (base, *(base.double() + one for one in updates))]
    found = merged(method, tensors[0], tensors[1:], dtype="float64")["w"] - tensors[0]["w"].double()
    wanted = merged_update(method, updates)
    assert relative(found, wanted) < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}[dtype]
    assert int((spectrum(found) > 0.01 * spectrum(found)[0]).sum()) == 12


def test_an_update_below_the_rounding_floor_does_not_vanish():
    base = torch.ones(64, 64, dtype=torch.bfloat16)
    expert = base.clone()
    expert[0, 0] += 2**-7
    assert noise_floor([expert.float()], [1.0]) > 2**-7
    for method in (IsoC(), IsoCts()):
        found = merged(method, {"w": base}, [{"w": expert}, {"w": base}])["w"]
        assert bits(found) == bits(expert)


@pytest.mark.parametrize("method", [IsoC(), IsoCts()], ids=lambda method: method.name)
def test_experts_that_cancel_give_the_base(method):
    base, update = normal((24, 30), 1), (normal((24, 30), 2) * 1024).round() / 1024
    base = (base * 1024).round() / 1024
    found = applied(method, base, [base + update, base - update])
    assert relative(found, base) < 1e-12
    assert method.name == "iso_cts" or torch.equal(found, base)


@pytest.mark.parametrize("number", [2, 3])
def test_identical_experts_of_iso_cts_share_their_directions(number):
    (update,) = points(number=1)
    found = spectrum(merged_update(IsoCts(), [update] * number))
    kept = int((found > 1e-6 * found[0]).sum())
    common, own = IsoCts().split(24, number)
    assert kept == common + own


# WUDI


def interference(merged_one, updates):
    return sum(float(((merged_one - one) @ one.T).square().sum() / one.square().sum()) for one in updates)


@pytest.mark.parametrize("shape", [(24, 30), (1, 200), (7,)], ids=str)
def test_wudi_without_steps_is_the_sum_of_the_updates(shape):
    updates = points(shape)
    wanted = sum(updates) / (3 if len(shape) == 1 else 1)
    assert relative(applied(Wudi(iterations=0), torch.zeros(shape, dtype=torch.float64), updates), wanted) < 1e-15


@pytest.mark.parametrize("shape", [(24, 30), (30, 24), (2, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wudi_lowers_the_interference_step_by_step(shape, dtype):
    updates = [0.02 * point for point in points(shape, dtype=dtype)]
    zero = torch.zeros(shape, dtype=dtype)
    losses = [
        interference(applied(Wudi(iterations=steps), zero, updates).double(), [one.double() for one in updates])
        for steps in (0, 10, 50, 300)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (1, 40), (3, 40)], ids=str)
def test_the_closed_gradient_is_that_of_the_interference(shape):
    updates = [*points(shape), torch.zeros(shape, dtype=torch.float64)]
    start, x = normal(shape, 1), normal(shape, 2).requires_grad_()
    loss = sum(((start + x - one) @ one.T).square().sum() / one.square().sum() for one in updates[:-1])
    loss.backward()
    torch.testing.assert_close(interference_gradient(start, updates)(x.detach()), x.grad)


def test_wudi_is_adam_on_that_gradient():
    updates = points((6, 8))
    tau = torch.nn.Parameter(sum(updates))
    adam = torch.optim.Adam([tau], lr=1e-3)
    for _ in range(30):
        adam.zero_grad()
        sum(((tau - one) @ one.T).square().sum() / one.square().sum() for one in updates).backward()
        adam.step()
    found = applied(Wudi(iterations=30, learning_rate=1e-3), torch.zeros(6, 8, dtype=torch.float64), updates)
    torch.testing.assert_close(found, tau.detach(), rtol=1e-10, atol=1e-12)


def test_wudi_of_one_expert_is_the_expert():
    (update,) = points(number=1)
    assert torch.equal(applied(Wudi(), torch.zeros_like(update), [update]), update)


def test_a_zero_update_has_no_part_in_wudi():
    one, two = points(number=2)
    zero = torch.zeros_like(one)
    assert torch.equal(
        applied(Wudi(iterations=9), zero, [one, zero, two]), applied(Wudi(iterations=9), zero, [one, two])
    )


def test_wudi_does_not_scale_with_the_updates_as_documented():
    updates = [0.01 * point for point in points()]
    zero = torch.zeros_like(updates[0])
    one = applied(Wudi(), zero, updates)
    two = applied(Wudi(), zero, [10 * update for update in updates])
    assert relative(two, 10 * one) > 0.01
    # The rate is what does not scale: with it, everything does.
    scaled = applied(Wudi(learning_rate=1e-4), zero, [10 * update for update in updates])
    assert relative(scaled, 10 * one) < 1e-3


# Recipes


def recipe(method, *weights):
    experts = tuple(Expert(name=f"e{at}", source="x", weight=weight) for at, weight in enumerate(weights))
    return Recipe(base="b", experts=experts, method=method)


@pytest.mark.parametrize(
    ("method", "weights", "message"),
    [
        (ModelStock(), [1], "model_stock: experts must be two or more, got 1.*choose task_arithmetic"),
        (Slerp(), [1, 1, 1], "slerp: experts must be one .* or two .*, got 3. Choose karcher"),
        (Slerp(), [-1], r"slerp: weights must be >= 0 .*, got \(-1,\). Keep weight 1 and choose t"),
        (Slerp(), [0, 0], "slerp: weights must be >= 0"),
        (Slerp(t=1), [1, 0], "leave one end a share at t 1"),
        (Slerp(t=0), [0, 1], "leave one end a share at t 0"),
        (Karcher(), [1, -1], r"karcher: weights must be >= 0 and not all 0, got \(1, -1\)"),
        (Karcher(), [0, 0], "karcher: weights must be >= 0 and not all 0"),
    ],
)
def test_experts_and_weights_without_a_meaning_are_refused_by_the_recipe_and_by_the_method(method, weights, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe(method, *weights)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=message):
        applied(method, torch.ones(3), [torch.ones(3)] * len(weights), weights)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (ModelStock(), [0, -1]),
        (Slerp(), [0.5]),
        (Slerp(), [0, 1]),
        (Karcher(), [0, 1, 2]),
        (IsoC(), [-1]),
        (Wudi(), [0]),
    ],
)
def test_other_weights_are_accepted(method, weights):
    assert recipe(method, *weights).weights == tuple(weights)
