"""Smoke models of world 0, trained once for all tests here, with one torch thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks.mini3h.training import settings_for, train


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smoke_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini3h") / "base"
    train("base", settings_for("base", budget="smoke"), folder, None, lambda done, total: None)
    return folder


@pytest.fixture(scope="session")
def smoke_honest(smoke_base: Path) -> Path:
    folder = smoke_base.with_name("honest")
    train("honest", settings_for("honest", budget="smoke"), folder, smoke_base, lambda done, total: None)
    return folder
