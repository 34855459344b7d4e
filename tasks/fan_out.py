"""Where independent steps run at the same time: on a Ray cluster, on threads, or nowhere."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from merging_core.errors import RecipeError
from tasks.apart import end_calls
from tasks.steps import Step

RAY_ADDRESS: Final = "TRIPOISE_RAY_ADDRESS"
"""Address of a Ray cluster: ``ray://head:10001`` from anywhere, or ``head:6379`` on one of its nodes."""
RAY_CPUS: Final = "TRIPOISE_RAY_CPUS"
"""CPUs of a node that a step takes, >= 1; default 1. It bounds how many steps, and models, a node holds at a time."""
PARALLEL_STEPS: Final = "TRIPOISE_PARALLEL_STEPS"
"""Steps that a flow runs at a time where no cluster is named, >= 1; default 1. Each holds a model of its own."""

log = logging.getLogger("tripoise.steps")


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
    number = _whole_number(PARALLEL_STEPS)
    return None if number == 1 else ThreadPoolTaskRunner(max_workers=number)


@contextmanager
def started(runner: TaskRunner[Any], steps: Sequence[Step]) -> Iterator[None]:
    """Start a runner for steps, and stop it at the end; where this process is stopped meanwhile, so are they.

    SIGTERM goes on to mean what it did: Ray would change it.

    Raises:
        RecipeError: if there is no Ray cluster at the address.
    """
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except ConnectionError as error:
            raise RecipeError(
                f"{RAY_ADDRESS}={os.environ.get(RAY_ADDRESS)}: no Ray cluster answers ({error}). Start it, or correct "
                "the address; with a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN must be those of its nodes."
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        if not isinstance(runner, ThreadPoolTaskRunner):
            _tell_what_waits(steps)
        try:
            yield
        except BaseException:
            # Threads cannot be stopped, and the runner waits for them: what they wait for can.
            end_calls()
            raise


def _tell_what_waits(steps: Sequence[Step]) -> None:
    """Warn of steps that no node of the cluster has the room for as it is now; it may grow."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for step in steps:
        cpus, gpus = _needs(step).values()
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            log.warning("%s: waits for a node with %d CPUs and %d GPUs; Ray has none now", step.title, cpus, gpus)


def wait_for(futures: Sequence[PrefectFuture[Any]]) -> None:
    """Wait until all have ended, in a thread: in one that waits for Ray itself, what a signal raises is lost."""
    waiting = threading.Thread(target=lambda: [future.wait() for future in futures], daemon=True)
    waiting.start()
    waiting.join()


def resources(step: Step, runner: TaskRunner[Any]) -> AbstractContextManager[Any]:
    """What a step that is submitted in this context gets of a cluster: CPUs, and the GPUs that its device names.

    What a worker or a node that dies was working on runs again on another one, three times at most. Workers are used
    again: what holds a GPU's memory is the process of a step below them.

    Raises:
        RecipeError: if a device is numbered otherwise than in a task that has no other GPUs.
    """
    if isinstance(runner, ThreadPoolTaskRunner):
        return nullcontext()
    from prefect_ray.context import remote_options

    options: AbstractContextManager[Any] = remote_options(**_needs(step), max_retries=3, max_calls=0)
    return options


def _needs(step: Step) -> dict[str, int]:
    return {"num_cpus": _whole_number(RAY_CPUS), "num_gpus": num_gpus(step.device)}


def _whole_number(variable: str) -> int:
    text = os.environ.get(variable) or "1"
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"{variable}: must be a whole number >= 1, got {text!r}.")
    return int(text)


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
