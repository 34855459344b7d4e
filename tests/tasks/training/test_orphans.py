"""A training does not outlive the process that asked for it."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[3]
PARENT = """
import sys
from tasks.sources import resolve
from tasks.store import Store
resolve(sys.argv[1], Store(sys.argv[2]))
"""
# One step of 28,800 parts. A worker that goes on until it next reports to a closed pipe is then at work for a minute.
NUM_PARTS = 28_800
SECONDS = 10


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_training_ends_with_its_parent_and_leaves_no_artifact(stop, world_store, base, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes/data/mini-3h-equal.yaml").read_text()) | {"num_documents": 144}
    recipe["training"] |= {"batch_size": NUM_PARTS, "accumulation": NUM_PARTS, "epochs": NUM_PARTS // 144}
    source = tmp_path / "recipe.yaml"
    source.write_text(yaml.safe_dump(recipe).replace("{budget}", "smoke").replace("{seed}", "0"))
    (tmp_path / "tmp").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(source), str(world_store.root)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.DEVNULL,
    )
    before = world_store.refs("checkpoint")
    worker = None
    try:
        worker = wait_for_training(world_store, parent)
        with open(os.pidfd_open(worker.pid)) as ended:  # readable when the process has ended
            parent.send_signal(stop)
            assert parent.wait(60) != 0
            assert select.select([ended], [], [], SECONDS)[0], "the training goes on without its parent"
    finally:
        parent.kill()
        parent.wait()
        if worker and worker.is_running():
            worker.kill()
    assert world_store.refs("checkpoint") == before
    # But for torch's own cache, which all processes share.
    assert [path for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")] == []


def wait_for_training(store, parent):
    """The worker of ``parent``, as soon as it trains."""
    deadline = time.monotonic() + 300
    while parent.poll() is None and time.monotonic() < deadline:
        for worker in psutil.Process(parent.pid).children():
            if list((store.root / "checkpoint").glob(".*.partial/tmp*")):
                return worker
        time.sleep(0.02)
    pytest.fail(f"no training began; the parent ended with {parent.poll()}")
