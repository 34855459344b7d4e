"""Serving: a Prefect server, its deployments and the workers of one machine, as children of this process."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil

from merging_core.errors import CheckpointError, MergeError, RecipeError

_START_SECONDS: Final = 240.0
_STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.2
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
log = logging.getLogger("tripoise.serve")


@dataclass(slots=True)
class Installation:
    """The processes of one machine. Each leads its own group: what it started goes with it."""

    url: str
    """Of the API."""
    environment: Mapping[str, str]
    children: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        """Start ``prefect`` with some arguments."""
        child = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            env=dict(self.environment) | environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.children.append((name, child))

    def await_health(self) -> None:
        """Wait until the server answers.

        Raises:
            CheckpointError: if it does not in four minutes, or ends before.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).is_success:
                    return
            time.sleep(_POLL_SECONDS)
        raise CheckpointError(f"{self.url}: no answer in {_START_SECONDS:.0f} s. See what the server printed.")

    def check(self) -> None:
        """Raise a CheckpointError if a child has ended."""
        for name, child in self.children:
            if (code := child.poll()) is not None:
                raise CheckpointError(f"{name}: ended with exit code {code}. See what it printed.")

    def stop(self) -> None:
        """End the workers with their runs, put those back into the queue, and end the server."""
        for number in _ENDING:  # a second one would leave processes behind
            signal.signal(number, signal.SIG_IGN)
        server, workers = self.children[:1], self.children[1:]
        pids = {str(one.pid) for _, child in workers for one in _descendants(child)}
        try:
            _end(workers)
            if pids and all(child.poll() is None for _, child in server):
                with contextlib.suppress(MergeError):
                    put_back(pids)
        finally:
            _end(server)


@contextlib.contextmanager
def installation(host: str, port: int) -> Iterator[Installation]:
    """A server on ``host:port``, starting; it and whatever is started beside it end with the context.

    Raises:
        RecipeError: if the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(f"{host}:{port}: {error.strerror}. Name another one with --port or --host.") from error
    # A shell that starts something in the background has it ignore interrupts, and workers end by them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A terminal that is closed; what nohup started goes on.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/api"
    found = Installation(url, _environment(url))
    try:
        found.start("server", "server", "start", "--host", host, "--port", str(port), "--log-level", "WARNING")
        yield found
    finally:
        found.stop()


def put_back(pids: Container[str]) -> None:
    """Let runs whose processes are gone start again when a worker comes back; the store has what they made.

    Args:
        pids: process ids, as the workers reported them.

    Raises:
        RecipeError, CheckpointError: see :func:`flows.deploying.apply.server`.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import AwaitingRetry

    from flows.deploying.apply import server

    under_way = [StateType.RUNNING, StateType.PENDING]
    asked = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way)))
    state: State[Any] = AwaitingRetry(message="Its worker was stopped.")
    with server() as client:
        for run in client.read_flow_runs(flow_run_filter=asked):
            # It may still name the process of an earlier start.
            submitted = run.state_type is StateType.PENDING and run.deployment_id
            if submitted or run.infrastructure_pid in pids:
                client.set_flow_run_state(run.id, state, force=True)


def start_workers(found: Installation, gpus: int | None) -> None:
    """One worker for light runs, and one for each GPU, whose runs see that GPU alone.

    Args:
        found: a running installation.
        gpus: how many GPUs there are; None: heavy runs share this machine one at a time, and light runs that need a
            merge or an evaluation make it themselves instead of starting another run.
    """
    worker = ("worker", "start", "--type", "process", "--install-policy", "never")
    steps = {} if gpus is None else {"TRIPOISE_GPU_STEPS": "deployments"}
    # No limit of its own: such a worker ends when a run that waited comes back before its first process has gone.
    found.start("worker cpu", *worker, "--pool", "tripoise-cpu", "--name", "cpu", **steps)
    for number in range(gpus or 1):
        visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": str(number)}
        name = f"gpu-{number}"
        found.start(f"worker {name}", *worker, "--pool", "tripoise-gpu", "--name", name, "--limit", "1", **visible)


def _environment(url: str) -> dict[str, str]:
    """Of all children; what the user set stays."""
    ours = {
        "PREFECT_API_URL": url,
        # The port may answer on several addresses; the UI asks the one that it came from.
        "PREFECT_SERVER_UI_API_URL": "/api",
    }
    defaults = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    password = os.environ.get("PREFECT_SERVER_API_AUTH_STRING")
    if password:
        defaults["PREFECT_API_AUTH_STRING"] = password
    return defaults | dict(os.environ) | ours


def _descendants(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(child.pid).children(recursive=True)
    return found


def _end(children: Sequence[tuple[str, subprocess.Popen[bytes]]]) -> None:
    for _, child in children:
        _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    for name, child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            log.warning("%s: did not end in %.0f s; killed", name, _STOP_SECONDS)
        # Also what the child itself has left behind.
        _signal(child, signal.SIGKILL)
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
