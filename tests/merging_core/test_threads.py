import threading

import pytest
import torch
from tiny_checkpoints import Merge, bits, random_update

from merging_core.methods import TaskArithmetic, Tsvm
from merging_core.threads import computed_ahead, one_torch_thread


@pytest.mark.parametrize("method", [Tsvm(), TaskArithmetic()])
def test_the_merged_bytes_do_not_depend_on_torchs_threads(method):
    """600 x 600 is large enough for torch to divide a product among its threads."""
    base = random_update(600, 600)
    experts = [{"w": base + 0.01 * random_update(600, 600, seed)} for seed in (1, 2)]
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        try:
            found.append(bits(Merge(method, {"w": base}, experts).tensors["w"]))
            assert torch.get_num_threads() == num_threads
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_torchs_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_torch_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_results_come_in_order_and_no_more_are_held_than_promised(num_workers):
    started, lock = [], threading.Lock()

    def compute(name):
        with lock:
            started.append(name)
        return name.upper()

    names = [f"n{number}" for number in range(20)]
    for taken, (name, result) in enumerate(computed_ahead(names, compute, num_workers), start=1):
        assert result == name.upper()
        assert len(started) <= taken + num_workers
    assert taken == len(names)
    assert sorted(started) == sorted(names)


def test_an_error_of_one_tensor_ends_the_rest():
    started = []

    def compute(name):
        started.append(name)
        if name == 3:
            raise ArithmeticError(name)
        return name

    with pytest.raises(ArithmeticError):
        list(computed_ahead(range(1000), compute, 2))
    assert len(started) < 10
