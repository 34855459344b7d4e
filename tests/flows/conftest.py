"""One real, temporary Prefect server with its own database and storage."""

import shutil

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    results = tmp_path_factory.mktemp("results")
    with prefect_test_harness(server_startup_timeout=180), temporary_settings({PREFECT_LOCAL_STORAGE_PATH: results}):
        yield


EXPERTS = ("helpful", "honest", "harmless")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A briefly trained mini-3H base, as a folder; enough for plumbing."""
    from tasks.sources import resolve
    from tasks.store import Store

    store = Store(tmp_path_factory.mktemp("trained"))
    return store.folder(resolve("mini3h://base?budget=smoke", store).ref)


@pytest.fixture
def expert_of(trained):
    """Writes a copy of the trained base with noise on its weights."""
    from safetensors.torch import load_file, save_file

    def write(folder, seed):
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("manifest.json"))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture
def models(trained, expert_of, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOISE_STORE", str(tmp_path / "store"))
    return {"base": str(trained)} | {
        name: str(expert_of(tmp_path / "models" / name, seed)) for seed, name in enumerate(EXPERTS)
    }
