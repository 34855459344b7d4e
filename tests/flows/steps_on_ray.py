"""Steps that say where they run and wait for a sign: ``python -m tests.flows.steps_on_ray FOLDER NUMBER DEVICE``.

In a process of its own: Ray changes a process, and what is defined here is sent to its workers by value.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import psutil
from prefect import flow

from tasks.orchestration import AsPrefectTasks
from tasks.steps import Step
from tasks.store import Store


def say_and_wait(number: int, folder: Path, out: Path) -> None:
    begun = {
        "number": number,
        "processes": [os.getpid(), *(process.pid for process in psutil.Process().parents())],
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    with (folder / "begun").open("a") as log:
        print(json.dumps(begun), file=log, flush=True)
    while not (folder / "go").exists():
        time.sleep(0.05)
    (out / "made").write_text(str(number))


@flow
def spread(folder: Path, number: int, device: str) -> None:
    steps = [
        Step("data", f"step {at}", {"number": at}, (), partial(say_and_wait, at, folder), device=device)
        for at in range(number)
    ]
    run = AsPrefectTasks(Store(folder / "store"))
    [refs] = run.map("work", [("all", steps)])
    assert [(run.store.folder(ref) / "made").read_text() for ref in refs] == [str(at) for at in range(number)]


if __name__ == "__main__":
    spread(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
