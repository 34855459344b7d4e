"""Progress of long steps: bars with an estimate on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Final, Literal

log = logging.getLogger("tripoise.progress")

# (done, total), both counted from the start of the step.
Progress = Callable[[int, int], None]
Watcher = Callable[[str, int, int], None]
Unit = Literal["bytes", "items"]
_SECONDS_BETWEEN_LINES: Final = 10.0
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_lock = threading.Lock()
_bars: list["_Bars"] = []
# What shows progress in place of this process, at most one.
_elsewhere: list[Callable[[str, Unit], AbstractContextManager[Progress]]] = []


def silent(done: int, total: int) -> None:
    """Report nothing."""


@contextlib.contextmanager
def track(title: str, unit: Unit = "items") -> Iterator[Progress]:
    """Show the progress of one step; several may run at the same time.

    Args:
        title: what is being done, such as ``merge r_tsvm``.
        unit: ``bytes`` are shown with their rate, ``items`` are counted.

    Yields:
        A function of (done, total), cheap enough to be called for every item.
    """
    if _elsewhere:
        with _elsewhere[0](title, unit) as progress:
            yield progress
        return
    with _terminal_bar(title, unit) if sys.stderr.isatty() else contextlib.nullcontext(_lines(title, unit)) as progress:
        watcher = _watcher.get()
        yield _also(progress, watcher, title) if watcher else progress


def shown_by(show: Callable[[str, Unit], AbstractContextManager[Progress]]) -> None:
    """Let something else show all progress of this process from now on, such as the process that started it."""
    _elsewhere[:] = [show]


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell somebody else too how far the steps are that begin in this context; every ten seconds, not at once.

    Args:
        watcher: called with title, done and total, maybe in another thread, never in two at the same time.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def track_bytes(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` bytes are done; yields a function of the bytes done since its last call."""
    done = 0
    with track(title, "bytes") as progress:

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, total)

        yield count


def _also(progress: Progress, watcher: Watcher, title: str) -> Progress:
    last, lock = time.monotonic(), threading.Lock()

    def both(done: int, total: int) -> None:
        nonlocal last
        progress(done, total)
        # Whoever comes while another thread is telling has nothing newer to say.
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES and lock.acquire(blocking=False):
            try:
                last = time.monotonic()
                watcher(title, done, total)
            finally:
                lock.release()

    return both


def _lines(title: str, unit: str) -> Progress:
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) * (total - done) / max(done, 1)
            log.info("%s: %s of %s, about %.0f s left", title, _amount(done, unit), _amount(total, unit), left)

    return progress


def _amount(count: int, unit: str) -> str:
    return f"{count / 1e6:,.1f} MB" if unit == "bytes" else f"{count:,}"


@contextlib.contextmanager
def _terminal_bar(title: str, unit: str) -> Iterator[Progress]:
    with _lock:
        if not _bars:
            _bars.append(_Bars())
        bars = _bars[0]
        bars.num_users += 1
    task = bars.display.add_task(title, total=None, amount="")
    try:
        yield lambda done, total: bars.display.update(
            task, completed=done, total=total, amount=f"{_amount(done, unit)} of {_amount(total, unit)}"
        )
    finally:
        with _lock:
            bars.display.remove_task(task)
            bars.num_users -= 1
            if not bars.num_users:
                bars.display.stop()
                _bars.clear()


class _Bars:
    """The one live display of the process: rich allows no second."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        self.num_users = 0
        self.display = Display(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.display.start()
