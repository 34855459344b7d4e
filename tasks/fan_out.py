"""Where independent steps run at the same time: on a Ray cluster, on threads, or nowhere."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from merging_core.errors import RecipeError
from tasks.steps import Step

RAY_ADDRESS: Final = "TRIPOISE_RAY_ADDRESS"
"""Address of a Ray cluster: ``ray://head:10001`` from anywhere, or ``head:6379`` on one of its nodes."""
PARALLEL_STEPS: Final = "TRIPOISE_PARALLEL_STEPS"
"""Steps that a flow runs at a time where no cluster is named, >= 1; default 1. Each holds a model of its own."""


def fan_out() -> TaskRunner[Any] | None:
    """What the environment names; None where steps run one after the other.

    Raises:
        RecipeError: if Ray is named and not installed, or the number of steps is none.
    """
    if address := os.environ.get(RAY_ADDRESS):
        try:
            from prefect_ray import RayTaskRunner
        except ImportError as error:
            raise RecipeError(
                f"{RAY_ADDRESS} names {address}; Ray is not installed: pip install 'tripoise[ray]'."
            ) from error
        runner: TaskRunner[Any] = RayTaskRunner(address=address, init_kwargs={"log_to_driver": False})
        return runner
    text = os.environ.get(PARALLEL_STEPS) or "1"
    if not text.isdecimal() or (number := int(text)) < 1:
        raise RecipeError(f"{PARALLEL_STEPS}: must be a whole number >= 1, got {text!r}.")
    return None if number == 1 else ThreadPoolTaskRunner(max_workers=number)


@contextmanager
def started(runner: TaskRunner[Any]) -> Iterator[None]:
    """Start a runner, and stop it at the end. SIGTERM goes on to mean what it did: Ray would change it."""
    before = signal.getsignal(signal.SIGTERM)
    with runner:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        yield


def wait_for(futures: Sequence[PrefectFuture[Any]]) -> None:
    """Wait until all have ended, in a thread: in one that waits for Ray itself, what a signal raises is lost."""
    waiting = threading.Thread(target=lambda: [future.wait() for future in futures], daemon=True)
    waiting.start()
    waiting.join()


def resources(step: Step, runner: TaskRunner[Any]) -> AbstractContextManager[Any]:
    """What a step that is submitted in this context gets of a cluster: a CPU, and the GPUs that its device names.

    What a worker or a node that dies was working on runs again on another one, three times at most. Workers are used
    again: what holds a GPU's memory is the process of a step below them.

    Raises:
        RecipeError: if a device is numbered otherwise than in a task that has no other GPUs.
    """
    if isinstance(runner, ThreadPoolTaskRunner):
        return nullcontext()
    from prefect_ray.context import remote_options

    options: AbstractContextManager[Any] = remote_options(
        num_cpus=1, num_gpus=num_gpus(step.device), max_retries=3, max_calls=0
    )
    return options


def num_gpus(device: str) -> int:
    """GPUs that a device names, in a task that has no others.

    Raises:
        RecipeError: if they are not numbered from 0.
    """
    named = [one for one in device.replace(" ", "").split(",") if one.startswith("cuda")]
    numbered = [f"cuda:{number}" for number in range(len(named))]
    if named not in (numbered, ["cuda"]):
        raise RecipeError(
            f"device {device}: on Ray a task sees its own GPUs only, numbered from 0. Name {','.join(numbered)}."
        )
    return len(named)
