"""The processes behind a call: each is forked from the one before, so that it starts within milliseconds.

    server   has imported what steps need, and waits for calls; ends with the process that started it
    keeper   waits until its worker has ended or the caller has let go; then ends all that is left below it
    worker   answers one call

A keeper, and no thread in the worker: C code that holds the interpreter's lock stops all threads of its process.
"""

import contextlib
import ctypes
import importlib
import itertools
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, NoReturn

import cloudpickle
import psutil
import torch

from tasks.progress import Progress, Unit, shown_by

# What steps that name a device import; none of it may begin to use CUDA, which no fork could use then.
_IMPORTED: Final = (
    *("tasks.merge", "tasks.vectors", "tasks.calibrate", "tasks.evaluate", "tasks.judges.steps", "tasks.mini3h.model"),
    *("tasks.models", "tasks.harness", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.api.task"),
    "transformers.models.auto.modeling_auto",
)
_GRACE_SECONDS: Final = 3.0
_SECONDS_TO_DIE: Final = 10.0
_SECONDS_BETWEEN_MESSAGES: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def serve() -> None:
    """Fork a keeper for every byte on the socket whose number is the last argument; return when it closes."""
    control = socket.socket(fileno=int(sys.argv[-1]))
    control.set_inheritable(False)
    for name in _IMPORTED:
        importlib.import_module(name)
    # Keepers have nobody to wait for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, handles, _, _ = socket.recv_fds(control, 1, 2)
        if not asked:
            return
        if os.fork() == 0:
            _never_return(partial(_keep, control, *handles))
        for handle in handles:
            os.close(handle)


def _keep(control: socket.socket, talk: int, bond: int) -> None:
    """Fork a worker; end with it, or when the caller lets go of ``bond``, to which its exit code is written."""
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Who loses its parent below becomes this process' own child, instead of getting away.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for handle in (talk, bond):
        os.set_inheritable(handle, False)
    keeper = os.getpid()
    if (worker := os.fork()) == 0:
        # It has nobody to end it without its keeper. Of one thread, so no other's end is taken for the keeper's.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
        os.close(bond)
        _never_return(partial(_work, Connection(talk)))
    os.close(talk)
    ended = os.pidfd_open(worker)
    ready, _, _ = select.select([bond, ended], [], [])
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) if ended in ready else 0
    _end_all_below()
    with contextlib.suppress(OSError):
        os.write(bond, str(code).encode())


def _end_all_below() -> None:
    """End all processes below this one: politely, then not."""
    here = psutil.Process()
    below = here.children(recursive=True)
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    psutil.wait_procs(below, timeout=_GRACE_SECONDS)
    # One that waits for a device cannot be killed before that answers; the caller does not wait for it.
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while (left := here.children(recursive=True)) and time.monotonic() < deadline:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=0.1)


def _work(talk: Connection) -> None:
    """Answer one call."""
    lock = threading.Lock()

    def say(*message: Any) -> None:
        with lock:
            talk.send(message)

    taken = talk.recv()
    os.environ.clear()
    os.environ.update(taken["environment"])
    os.chdir(taken["folder"])
    torch.set_num_threads(taken["threads"])
    for name, level in taken["levels"].items():
        logging.getLogger(name).setLevel(level)
    logging.root.handlers = [_ToCaller(say)]
    shown_by(_Relay(say).track)
    say("started")
    try:
        answer = cloudpickle.loads(talk.recv_bytes())()
    except Exception as error:
        say("error", _sendable(error))
    else:
        say("result", answer)


class _ToCaller(QueueHandler):
    """Log records go to the caller, whose handlers decide."""

    def __init__(self, say: Any) -> None:
        super().__init__(say)

    def enqueue(self, record: logging.LogRecord) -> None:
        """See :class:`logging.handlers.QueueHandler`."""
        self.queue("record", record)  # type: ignore[operator]


class _Relay:
    """Progress is shown by the caller."""

    def __init__(self, say: Any) -> None:
        self._say, self._numbers = say, itertools.count()

    @contextlib.contextmanager
    def track(self, title: str, unit: Unit) -> Iterator[Progress]:
        """See :func:`tasks.progress.track`."""
        number, last = next(self._numbers), -_SECONDS_BETWEEN_MESSAGES
        self._say("track", number, title, unit)

        def progress(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_MESSAGES or done == total:
                last = now
                self._say("progress", number, done, total)

        yield progress


def _sendable(error: Exception) -> ExceptionWithTraceback:
    """An error with its traceback; one that cannot be copied is told in its words."""
    try:
        packed = ExceptionWithTraceback(error, error.__traceback__)
        ForkingPickler.loads(ForkingPickler.dumps(packed))
    except Exception:
        return ExceptionWithTraceback(RuntimeError(f"{type(error).__name__}: {error}"), error.__traceback__)
    return packed


def _never_return(body: Callable[[], None]) -> NoReturn:
    """Run what a forked process is for, and end it, whatever happens."""
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
