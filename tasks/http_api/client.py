"""The client: pace, retries with backoff, no secret in any message."""

import email.utils
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from typing import Any, Final, Self, TypeVar

import httpx

from merging_core.errors import CheckpointError, RecipeError
from tasks.http_api.pace import Pace, Stopped
from tasks.http_api.settings import ApiSettings, key_of
from tasks.progress import Progress, silent

_LONGEST_BACKOFF_S: Final = 60.0
_LONGEST_PAUSE_S: Final = 900.0
_TRANSIENT: Final = frozenset({408, 409, 425, 429})
_SHORTEST_SECRET: Final = 8
_SHOWN: Final = 300
"""Characters of what a server says instead of an answer."""
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

log = logging.getLogger("tripoise.http")


class ApiClient:
    """Asks one endpoint; safe to use from several threads at once. Open it as a context.

    Args:
        settings: address, key and pace.
        subject: how messages call the endpoint.
        refused: remedy for a request that the server does not accept.
        failed: remedy for a server that stays out of reach, busy or broken.

    Raises:
        RecipeError: see :func:`key_of`.
    """

    def __init__(self, settings: ApiSettings, subject: str, *, refused: str, failed: str) -> None:
        self.subject = f"{subject} {settings.url}"
        self._settings, self._refused, self._failed = settings, refused, failed
        self._key, self._pace = key_of(settings, subject), Pace(settings.requests_per_minute)
        self._client = httpx.Client(
            base_url=settings.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=settings.concurrency),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def each(self, ask: Callable[[_Item], _Found], items: Sequence[_Item], progress: Progress = silent) -> list[_Found]:
        """Call ``ask`` for every item, several at a time, until one fails: then no other request starts any more.

        Args:
            ask: calls :meth:`post`.
            items: what is asked about.
            progress: called with the number of items that are done, and of all.

        Returns:
            What ``ask`` gave, in the order of the items.
        """

        def guarded(item: _Item) -> _Found:
            try:
                return ask(item)
            except Exception:
                self._pace.stop()  # here, so that no other request starts meanwhile
                raise

        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="ask")
        try:
            pending = [pool.submit(guarded, item) for item in items]
            for done, one in enumerate(as_completed(pending), start=1):
                if (error := one.exception()) and not isinstance(error, Stopped):
                    raise error
                progress(done, len(items))
            return [one.result() for one in pending]
        except BaseException:
            # After a failure or an interrupt the requests that wait are given up, those under way are awaited.
            self._pace.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def post(self, path: str, body: Mapping[str, Any], tolerated: frozenset[int] = frozenset()) -> httpx.Response:
        """Send one request, again while the server is out of reach, busy or broken.

        Args:
            path: below the endpoint's url.
            body: JSON-able.
            tolerated: statuses that are returned to the caller beside those of success.

        Raises:
            RecipeError: if the endpoint refuses the request.
            CheckpointError: if it fails after all retries, or asks for a pause that is too long to wait for.
            Stopped: if another request failed meanwhile.
        """
        retries = self._settings.retries
        for attempt in range(retries + 1):
            self._pace.wait()
            try:
                response = self._client.post(path, json=body)
            except httpx.RequestError as error:
                trouble, asked = self.shown(f"{type(error).__name__}: {error}".rstrip(": ")), None
            else:
                if response.is_success or response.status_code in tolerated:
                    return response
                trouble = f"HTTP {response.status_code}: {self.shown(response.text)}"
                if response.status_code not in _TRANSIENT and response.status_code < 500:
                    raise RecipeError(f"{self.subject}: refuses the request ({trouble}). {self._refused}")
                asked = _retry_after(response)
            if attempt < retries:
                self._hold(attempt, asked, trouble)
        raise CheckpointError(f"{self.subject}: failed {retries + 1} times, last: {trouble}. {self._failed}")

    def scrub(self, text: str) -> str:
        """An answer without the key; a shorter one is no secret, and may be part of any text."""
        return text.replace(self._key, "***") if self._key and len(self._key) >= _SHORTEST_SECRET else text

    def shown(self, text: str) -> str:
        """The beginning of what came instead of an answer, in one line, without the key."""
        # Before it is cut, or a part of the key would stay.
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:_SHOWN]

    def _hold(self, attempt: int, asked: float | None, trouble: str) -> None:
        """Wait before the next attempt: all requests as long as the server asked, else this one, longer each time."""
        if asked is not None and asked > _LONGEST_PAUSE_S:
            raise CheckpointError(f"{self.subject}: asks to wait {asked:.0f} s ({trouble}). Run again later.")
        if asked is not None:
            log.info("%s: %s; all requests wait %.1f s", self.subject, trouble, asked)
            self._pace.pause(asked)
            return
        # Jitter, so that requests that failed together do not come back together.
        seconds = min(self._settings.backoff_s * 2**attempt, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
        log.info("%s: %s; next attempt in %.1f s", self.subject, trouble, seconds)
        self._pace.sleep(seconds)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, from a number or a date; None if it does not say."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
