"""Which precision goes in, computes and comes out; and what is said when a number is not finite."""

import pytest
import torch
from tiny_checkpoints import FLOATS, Merge, assert_same_bits, bits, llama, merged, relative, tuned, write_folder

from merging_core.errors import IncompatibleError, NumericalError
from merging_core.methods import Linear, RTsvm, TaskArithmetic, Tsvm
from merging_core.recipe import DTYPES
from merging_core.task_vectors import require_finite, update_of

METHODS = [Linear(), TaskArithmetic(), Tsvm(), RTsvm()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
MATRIX, VECTOR = "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


@every_method
@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("expert_dtype", FLOATS)
def test_the_result_is_stored_as_the_base_whatever_the_experts(method, base_dtype, expert_dtype):
    base = llama(dtype=base_dtype)
    experts = [{**tuned(llama(dtype=expert_dtype), seed)} for seed in (1, 2)]
    result = merged(method, base, experts)
    assert {name: t.dtype for name, t in result.items()} == {name: t.dtype for name, t in base.items()}


@every_method
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("base_dtype", FLOATS)
def test_a_recipe_may_store_another_dtype(method, stored, base_dtype):
    base = llama(dtype=base_dtype)
    result = merged(method, base, [tuned(base, 1), tuned(base, 2)], dtype=stored)
    for name, tensor in result.items():
        assert tensor.dtype == (DTYPES[stored] if base[name].dtype.is_floating_point else base[name].dtype)


@every_method
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_results_are_the_float64_formula_rounded_once(method, stored):
    base = llama(dtype=stored)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    found = merged(method, base, experts)
    exact = merged(method, base, experts, compute_dtype="float64", dtype="float64")
    for name in base:
        if base[name].dtype.is_floating_point:
            _, exponent = torch.frexp(exact[name])
            half = torch.finfo(stored).eps * torch.exp2(exponent.double() - 1) / 2
            # The error of float32 arithmetic on values below 1, which may fall on the other side of a tie.
            assert ((found[name].double() - exact[name]).abs() <= half + 1e-7).all(), name


@every_method
def test_a_float64_checkpoint_is_computed_in_float64(method):
    base = llama(dtype=torch.float64)
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    narrow, wide = merged(method, base, experts), merged(method, base, experts, compute_dtype="float64")
    for name in base:
        assert bits(narrow[name]) == bits(wide[name])
    # Not only stored as float64: rounding to float32 would change it.
    assert not torch.equal(narrow[MATRIX], narrow[MATRIX].float().double())


@every_method
def test_float32_and_float64_inputs_agree(method):
    base = llama()
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    wide = [{name: t.double() if t.dtype == torch.float32 else t for name, t in x.items()} for x in (base, *experts)]
    narrow_result, wide_result = merged(method, base, experts), merged(method, wide[0], wide[1:])
    for name in base:
        if base[name].dtype.is_floating_point:
            assert relative(narrow_result[name], wide_result[name]) < 1e-6


@every_method
def test_values_beyond_float32_are_legal_in_float64(method):
    base = {"w": torch.full((4, 4), 1e300, dtype=torch.float64)}
    result = merged(method, base, [base, base])
    torch.testing.assert_close(result["w"], base["w"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_eight_bit_floats_are_merged_in_float32(dtype):
    base = {"w": torch.ones(4, 4).to(dtype)}
    experts = [{"w": torch.full((4, 4), 2.0).to(dtype)}, {"w": torch.full((4, 4), 4.0).to(dtype)}]
    assert bits(merged(Linear(), base, experts)["w"]) == bits(torch.full((4, 4), 3.0).to(dtype))
    assert bits(merged(TaskArithmetic(), base, experts)["w"]) == bits(torch.full((4, 4), 5.0).to(dtype))
    assert_same_bits(merged(Tsvm(scale=0), base, experts), base)


# Not finite


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [MATRIX, VECTOR, "model.scalar"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_broken_entry_names_tensor_and_expert(method, value, name, dtype):
    base = llama(dtype=dtype)
    experts = {"helpful": tuned(base, 1), "honest": tuned(base, 2), "harmless": tuned(base, 3)}
    experts["honest"][name].view(-1)[0] = value
    with pytest.raises(NumericalError) as caught:
        merged(method, base, experts)
    message = str(caught.value)
    assert repr(name) in message
    assert "expert 'honest'" in message
    assert "helpful" not in message
    assert f"1 of {base[name].numel()} entries are NaN or infinite" in message


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_a_broken_base_is_named(method):
    base = llama()
    experts = [tuned(base, 1)]
    base[MATRIX][0, 0] = float("nan")
    with pytest.raises(NumericalError, match=rf"'{MATRIX}': 1 of 240 entries are NaN or infinite in the base"):
        merged(method, base, experts)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_opposite_infinities_do_not_cancel(scale):
    base = {"w": torch.zeros(2, 2)}
    experts = [{"w": torch.full((2, 2), sign * float("inf"))} for sign in (1, -1)]
    with pytest.raises(NumericalError, match="expert 'helpful'"):
        merged(TaskArithmetic(scale=scale), base, experts)


@pytest.mark.parametrize("method", [TaskArithmetic(scale=3), Tsvm(scale=3), RTsvm(scale=3)], ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [(4, 4), (5,)])
def test_a_result_beyond_the_stored_dtype_is_an_error_with_a_remedy(method, shape):
    base = {"w": torch.zeros(shape)}
    experts = [{"w": torch.full(shape, 60000.0)}]
    assert torch.isfinite(merged(method, base, experts)["w"]).all()
    with pytest.raises(NumericalError) as caught:
        merged(method, base, experts, dtype="float16")
    message = str(caught.value)
    assert "'w'" in message
    assert method.name in message
    assert "torch.float16" in message
    assert "wider dtype" in message


def test_a_float32_sum_that_overflows_is_an_error():
    base = {"w": torch.zeros(3)}
    with pytest.raises(NumericalError, match="'w'"):
        merged(Linear(normalize=False), base, [{"w": torch.full((3,), 3e38)}] * 2)


def test_updates_are_taken_in_float64(tmp_path):
    from merging_core.checkpoint import Checkpoint

    base = write_folder(tmp_path / "base", {"w": torch.tensor([1e30], dtype=torch.float32)})
    expert = write_folder(tmp_path / "expert", {"w": torch.tensor([1.0], dtype=torch.float64)})
    update = update_of(Checkpoint(base), Checkpoint(expert), "w")
    assert update.dtype == torch.float64
    assert update.item() == 1.0 - float(torch.tensor(1e30))


def test_a_finite_tensor_passes_the_check():
    for dtype in (*FLOATS, torch.float8_e4m3fn, torch.int64):
        require_finite("w", torch.ones(3).to(dtype), "the base")


# Tensors that cannot be merged


@every_method
@pytest.mark.parametrize("other", [torch.arange(7) + 1, torch.zeros(7, dtype=torch.int64)])
def test_integer_buffers_that_differ_are_refused_by_name(method, other):
    base = llama()
    experts = {"helpful": tuned(base, 1), "honest": tuned(base, 2) | {"model.position_ids": other}}
    with pytest.raises(IncompatibleError) as caught:
        merged(method, base, experts)
    assert "'model.position_ids'" in str(caught.value)
    assert "['honest']" in str(caught.value)


@every_method
def test_a_checkpoint_without_any_float_is_copied(method):
    base = {"ids": torch.arange(5), "mask": torch.tensor([True])}
    assert_same_bits(merged(method, base, [base, base]), base)


@every_method
def test_empty_tensors_stay_empty(method):
    base = {"w": torch.zeros(0, 4), "v": torch.zeros(0), "x": torch.zeros(3, 0), "y": torch.ones(2, 2)}
    assert_same_bits(merged(method, base, [base, base]), base)


@every_method
def test_inputs_are_left_as_they_are(method):
    base = llama()
    job = Merge(method, base, [tuned(base, 1), tuned(base, 2)])
    folders = [job.inputs.base, *job.inputs.experts.values(), *job.inputs.vectors.values()]
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    job.again()
    assert before == {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
