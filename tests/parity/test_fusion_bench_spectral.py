"""Parity of ``iso_c``, ``iso_cts`` and ``wudi`` with FusionBench 0.2.33 (MIT), on full-rank float32 updates.

The reference is installed aside, so that its pins do not meet ours:
``pip install --no-deps --target .parity fusion-bench==0.2.33``. Its files are loaded by path, with stubs around them.
The isotropic methods, in float32, are compared with the reference in float64: its own rounding in float32 moves Iso-CTS
by 1e-5, where the joined basis is ill-conditioned. Rank-deficient sums are no case for an oracle: there the reference
lifts arbitrary null-space vectors to full size.
"""

import contextlib
import importlib.util
import io
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from merging_core.methods import IsoC, IsoCts, Site, Wudi

ROOT = Path(os.environ.get("TRIPOISE_PARITY", Path(__file__).parents[2] / ".parity"))
METHODS = ROOT / "fusion_bench/method"
VERSION = "0.2.33"
TOLERANCE = 1e-6

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not METHODS.is_dir(),
        reason=f"no FusionBench in {ROOT}: pip install --no-deps --target {ROOT} fusion-bench=={VERSION}",
    ),
]

# What the files import of the package around them, which would import half of an ecosystem.
STUBS = {
    "fusion_bench": {"BaseAlgorithm": object, "BaseModelPool": object, "auto_register_config": lambda cls: cls},
    "fusion_bench.mixins": {"LightningFabricMixin": type("LightningFabricMixin", (), {})},
    "fusion_bench.utils": {"timeit_context": contextlib.nullcontext},
    "fusion_bench.utils.type": {"StateDictType": dict},
    "fusion_bench.utils.state_dict_arithmetic": {"state_dict_add": None, "state_dict_sub": None},
}


def load(file, monkeypatch):
    for name, content in STUBS.items():
        stub = types.ModuleType(name)
        vars(stub).update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def isotropic(monkeypatch):
    return load(METHODS / "isotropic_merging/iso_utils.py", monkeypatch)


@pytest.fixture
def wudi_merging(monkeypatch):
    return load(METHODS / "wudi/wudi.py", monkeypatch).wudi_merging


def silent(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)["w"].detach()


def updates_of(shape, number, size=0.02):
    draw = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=draw) * size for _ in range(number)]


def ours(method, updates):
    # A zero base: the updates that we take are then, bit for bit, the ones that the reference gets.
    site = Site("w", tuple(f"expert{at}" for at in range(len(updates))), 0)
    return method.merge(torch.zeros_like(updates[0]), updates, [1.0] * len(updates), site)


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def named(updates, dtype=torch.float32):
    return [{"w": update.to(dtype, copy=True)} for update in updates]


every_shape = pytest.mark.parametrize(
    "shape", [(48, 60), (60, 48), (128, 128), (64, 200), (33, 50), (1, 20), (3, 9)], ids=lambda s: "x".join(map(str, s))
)
every_number = pytest.mark.parametrize("number", [1, 2, 3, 4])


def test_the_reference_is_the_version_we_name():
    assert (ROOT / f"fusion_bench-{VERSION}.dist-info").is_dir()


@every_shape
@every_number
def test_iso_c_agrees(isotropic, shape, number):
    updates = updates_of(shape, number)
    wanted = silent(isotropic.iso_c, named(updates, torch.float64), "cpu")
    assert distance(ours(IsoC(), updates), wanted) < TOLERANCE


@every_shape
@every_number
@pytest.mark.parametrize("fraction", [0.8, 0.5, 1.0])
def test_iso_cts_agrees(isotropic, shape, number, fraction):
    updates = updates_of(shape, number)
    wanted = silent(isotropic.iso_cts, named(updates, torch.float64), fraction, "cpu")
    assert distance(ours(IsoCts(common_fraction=fraction), updates), wanted) < TOLERANCE


@every_shape
@every_number
@pytest.mark.parametrize("iterations", [0, 1, 5, 20])
def test_wudi_agrees(wudi_merging, shape, number, iterations):
    updates = updates_of(shape, number)
    found = ours(Wudi(iterations=iterations), updates)
    wanted = silent(wudi_merging, named(updates), "cpu", iterations)
    assert distance(found, wanted) < TOLERANCE
    start = sum(updates)
    # One expert is where the loss is 0 already: Adam follows what rounding leaves.
    if iterations and number > 1:
        assert distance(found - start, wanted - start) < 1e-3


@pytest.mark.parametrize("number", [2, 3])
def test_a_vector_is_averaged_as_by_the_reference(isotropic, wudi_merging, number):
    updates = updates_of((77,), number)
    for method, wanted in (
        (IsoC(), silent(isotropic.iso_c, named(updates), "cpu")),
        (IsoCts(), silent(isotropic.iso_cts, named(updates), 0.8, "cpu")),
        (Wudi(), silent(wudi_merging, named(updates), "cpu", 3)),
    ):
        assert distance(ours(method, updates), wanted) < 1e-6
