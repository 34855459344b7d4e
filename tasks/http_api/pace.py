"""When requests may start: so many a minute, none while a server asked for a pause, none after a failure."""

import threading
import time


class Stopped(Exception):
    """Another request failed for good; this one was given up."""


class Pace:
    """Shared by all requests to one endpoint."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._between = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def wait(self) -> None:
        """Block until it is this request's turn.

        Raises:
            Stopped: if :meth:`stop` was called.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                if (delay := self._next - now) <= 0:
                    self._next = now + self._between
            if self._stop.wait(max(delay, 0.0)):
                raise Stopped
            if delay <= 0:
                return

    def pause(self, seconds: float) -> None:
        """Let no request start for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Let only the caller wait.

        Raises:
            Stopped: if :meth:`stop` was called.
        """
        if self._stop.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """Wake everybody who waits, and let no request start any more."""
        self._stop.set()
