"""One thread, repeatable property tests, shape checks, and the helper modules of this folder on the import path.

Nothing of ``merging_core`` is imported here, so that its modules can still be instrumented.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
if "merging_core" not in sys.modules:
    install_import_hook("merging_core", "shape_checks.check")

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    # tmp_path is shared by the examples of one test; each example makes its own folder in it.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
