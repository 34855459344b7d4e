import pytest
import torch

from tasks.store import Store


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")
