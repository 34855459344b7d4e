"""Calling a function in a child process, and following it."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Final, TypeVar

import cloudpickle
import torch

from merging_core.errors import ProcessError
from tasks.progress import Progress, track

Result = TypeVar("Result")
# -P: a file named torch.py in the current folder must not be what the server imports.
_COMMAND: Final = (sys.executable, "-P", "-X", "utf8", "-c", "from tasks.apart.server import serve; serve()")


def call_apart(what: str, call: Callable[[], Result], timeout_s: float | None = None, again: str = "") -> Result:
    """Call a function in a child process, which ends with this call, however it ends, and with this process.

    The child has this process' environment, folder, log levels and number of torch threads as they are now; what a
    library read of the environment when it was imported stays as it was at the first call. Variables of Prefect, its
    password among them, are not given to it. Its log records and its progress are shown here.

    The call travels by cloudpickle, since steps hold functions made within functions: over a socket between this
    process and its own child, never through a file or from another machine.

    Args:
        what: the subject of errors.
        call: may be any function, with what it refers to.
        timeout_s: seconds, > 0, after which the child is stopped with all processes it has started; None: never.
        again: what a new attempt gains, a sentence for errors.

    Returns:
        What the call returns, copied.

    Raises:
        ProcessError: if the limit passed or the child died. What ``call`` raises passes through, with its traceback
            in the child as the cause.
    """
    talk, theirs = Pipe()
    bond, held = socket.socketpair()
    with talk, bond, _noted(bond):
        with theirs, held:
            _server.fork(theirs.fileno(), held.fileno())
        try:
            # The child may have died; then following it says how.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                talk.send(_circumstances())
                talk.send_bytes(cloudpickle.dumps(call))
            result: Result = _Following(what, talk, bond, timeout_s, again).result()
            return result
        finally:
            # The keeper ends what is left of the child, and then closes its end.
            with contextlib.suppress(OSError):
                bond.shutdown(socket.SHUT_WR)
                while bond.recv(64):
                    pass


def end_calls() -> None:
    """End the calls of all threads of this process; each raises a ProcessError there."""
    for bond in list(_bonds):
        with contextlib.suppress(OSError):
            bond.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _noted(bond: socket.socket) -> Iterator[None]:
    _bonds.add(bond)
    try:
        yield
    finally:
        _bonds.discard(bond)


class _Following:
    """Shows here what a child says, until it has an answer or has ended."""

    def __init__(self, what: str, talk: Connection, bond: socket.socket, timeout_s: float | None, again: str) -> None:
        self.what, self.talk, self.bond, self.timeout_s, self.again = what, talk, bond, timeout_s, again
        self.deadline: float | None = None

    def result(self) -> Any:
        """See :func:`call_apart`."""
        progress: dict[int, Progress] = {}
        with contextlib.ExitStack() as bars:
            while message := self._next():
                match message:
                    case ("started",):
                        # From now on: the first call waits for the imports.
                        self.deadline = time.monotonic() + self.timeout_s if self.timeout_s else None
                    case ("record", record):
                        if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                            logger.handle(record)
                    case ("track", number, title, unit):
                        progress[number] = bars.enter_context(track(title, unit))
                    case ("progress", number, done, total):
                        progress[number](done, total)
                    case ("error", error):
                        raise error
                    case ("result", result):
                        return result
        raise self._death()

    def _next(self) -> Any:
        """The next message; None where the child has ended."""
        left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0)
        ready = wait([self.talk, self.bond], left)
        if not ready:
            raise ProcessError(
                f"{self.what}: stopped after {(self.timeout_s or 0) / 60:g} minutes, its time limit. Raise "
                f"timeout_minutes or leave it out. {self.again}".rstrip()
            )
        if self.talk in ready:
            with contextlib.suppress(EOFError, ConnectionResetError):
                return self.talk.recv()
        return None

    def _death(self) -> ProcessError:
        code = self.bond.recv(64).decode()
        if not code:
            return ProcessError(f"{self.what}: its process could not be started, or lost its keeper. See the output.")
        if (number := -int(code)) <= 0:
            return ProcessError(f"{self.what}: its process ended with exit code {code} and no answer. See its output.")
        named = f"{self.what}: its process was ended by signal {number} ({signal.Signals(number).name})"
        if number == signal.SIGKILL:
            named += ", probably for want of memory. Lower batch_size, or give the machine or container more memory"
        return ProcessError(f"{named}. {self.again}".rstrip())


def _circumstances() -> dict[str, Any]:
    """What the child takes over of this process besides the call."""
    loggers = {"": logging.root} | {
        name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)
    }
    return {
        "environment": _environment(),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "levels": {name: one.level for name, one in loggers.items() if one.level},
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


class _Server:
    """The process that children are forked from; started by the first call, ends when this process has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self, *handles: int) -> None:
        """Fork a keeper and its worker, which get the handles; starts the server, again if it has died."""
        with self._lock:
            if self._control is not None:
                with contextlib.suppress(OSError):
                    socket.send_fds(self._control, [b"1"], handles)
                    return
                self._control.close()
            self._control = self._start()
            socket.send_fds(self._control, [b"1"], handles)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        modules = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            # In a session of its own: what a terminal sends to all its processes ends the children through this one.
            self._process = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno())],
                env=_environment() | {"PYTHONPATH": modules},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return ours


_server: Final = _Server()
_bonds: Final = set[socket.socket]()
"""Of the calls under way."""
