"""A client of a Tripoise server: start a run of a deployment, wait for it, decide what it asks.

Example::

    with Client("http://127.0.0.1:4200/api") as client:
        run = client.trigger("merge", {"request": {"recipe": {...}}}, idempotency_key="merge-42")
        print(client.wait(run).message)
"""

import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import httpx

from merging_core.errors import CheckpointError, RecipeError
from tasks.names import nearest

_FINAL: Final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_POLL_SECONDS: Final = 2.0
# On SQLite a Prefect server waits 60 s where two writers block each other, and then says 503, which is tried again.
_TIMEOUT_SECONDS: Final = 90.0
CRASH_GRACE_SECONDS: Final = 30.0
"""Within this time an automation puts a run that was lost back into the queue (deployments/automations.yaml)."""
_SETTLE_SECONDS: Final = 5.0
_PAUSES_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a deployment, as the server saw it last."""

    id: str
    name: str
    state: str
    """SCHEDULED, PENDING, RUNNING, PAUSED, COMPLETED, FAILED, CRASHED, CANCELLING or CANCELLED."""
    message: str
    """What the run said of its end."""

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state in _FINAL


class Client:
    """Talks to the REST API of one server; use it as a context.

    What can be asked twice is asked again, for a quarter of a minute, when there is no answer, or a proxy's 502.
    """

    def __init__(self, url: str | None = None, password: str | None = None) -> None:
        """Name the server.

        Args:
            url: of the API, ending in ``/api``; default: ``PREFECT_API_URL``.
            password: ``user:password``; default: ``PREFECT_API_AUTH_STRING``, else none.

        Raises:
            RecipeError: if no server is named.
            OSError: if the file ``PREFECT_API_SSL_CERT_FILE``, which says who signed its certificate, cannot be read.
        """
        if not (url := url or os.environ.get("PREFECT_API_URL")):
            raise no_server()
        user, _, secret = (password or os.environ.get("PREFECT_API_AUTH_STRING") or "").partition(":")
        auth = httpx.BasicAuth(user, secret) if user else None
        trusted = os.environ.get("PREFECT_API_SSL_CERT_FILE")
        verify = ssl.create_default_context(cafile=trusted) if trusted else True
        self._http = httpx.Client(base_url=url.rstrip("/"), auth=auth, timeout=_TIMEOUT_SECONDS, verify=verify)
        self._http.headers["Prefect-Csrf-Client"] = uuid4().hex

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def deployment(self, name: str) -> dict[str, Any]:
        """What the server knows of a deployment.

        Args:
            name: such as ``merge``, or with its flow, ``benchmark/benchmark-mini-3h-quick``.

        Raises:
            RecipeError: if there is none, with the nearest right name.
        """
        flow, _, short = name.rpartition("/")
        asked: dict[str, Any] = {"deployments": {"name": {"any_": [short]}}}
        if flow:
            asked["flows"] = {"name": {"any_": [flow]}}
        found: list[dict[str, Any]] = self._call("POST", "/deployments/filter", asked)
        if len(found) != 1:
            ours = {"deployments": {"tags": {"all_": ["tripoise"]}}}
            names = sorted(one["name"] for one in self._call("POST", "/deployments/filter", ours))
            what = "several deployments match; name its flow too" if found else "no such deployment"
            raise RecipeError(f"{name!r}: {what}.{nearest(short, names)} All: {', '.join(names) or 'none'}.")
        return found[0]

    def trigger(
        self, name: str, parameters: Mapping[str, Any] | None = None, idempotency_key: str | None = None
    ) -> Run:
        """Start a run.

        Args:
            name: of the deployment.
            parameters: of the flow; a parameter that is left out is the deployment's own.
            idempotency_key: a second call with the same key gives the run of the first.

        Raises:
            RecipeError: if the deployment does not exist, or the server refuses a parameter, naming it.
            CheckpointError: if the server does not answer, or refuses the password.
        """
        place = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        # With a key of its own it can be asked twice.
        key = idempotency_key or uuid4().hex
        body = {"parameters": dict(parameters or {}), "state": {"type": "SCHEDULED"}, "idempotency_key": key}
        return _run(self._call("POST", place, body))

    def read(self, run: Run | str) -> Run:
        """The run as it is now."""
        return _run(self._call("GET", f"/flow_runs/{run.id if isinstance(run, Run) else run}"))

    def wait(self, run: Run | str, timeout: float | None = None) -> Run:
        """Wait until a run has ended or is paused. One that crashed may be started again: that takes half a minute.

        Raises:
            CheckpointError: if it has not after ``timeout`` seconds; None waits for ever.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        alive = time.monotonic()
        while True:
            now = self.read(run)
            if now.state != "CRASHED":
                alive = time.monotonic()
            lost = now.state == "CRASHED" and time.monotonic() - alive < CRASH_GRACE_SECONDS
            if now.state == "PAUSED":
                # Its process is still ending; who decides before it has gone upsets Prefect's worker.
                time.sleep(_SETTLE_SECONDS)
                return now
            if now.is_final and not lost:
                return now
            if deadline is not None and time.monotonic() > deadline:
                raise CheckpointError(f"run {now.name}: still {now.state} after {timeout:g} s. Look at it in the UI.")
            time.sleep(_POLL_SECONDS)

    def decide(self, run: Run | str, decision: str, note: str = "") -> None:
        """Answer a run that is paused for approval.

        Args:
            run: paused.
            decision: promote or reject.
            note: kept with the decision.

        Raises:
            RecipeError: if the server does not accept it: the run is not paused, or the decision is no such word.
        """
        place = f"/flow_runs/{run.id if isinstance(run, Run) else run}/resume"
        answer = self._call("POST", place, {"run_input": {"decision": decision, "note": note}})
        # What is refused is answered with 200 too.
        if answer["status"] != "ACCEPT":
            raise RecipeError(f"decision {decision!r}: refused: {answer['details'].get('reason')}")

    def _call(self, verb: str, place: str, body: Any = None) -> Any:
        twice = verb == "GET" or place.endswith("/filter") or "idempotency_key" in (body or {})
        for pause in (*_PAUSES_SECONDS, 0.0):  # after the last one it gives up
            try:
                answer = self._send(verb, place, body)
            except httpx.TransportError as error:
                if not (pause and twice):
                    raise no_answer(str(self._http.base_url).rstrip("/"), error) from error
            else:
                # With 503 Prefect says that two writers met in its database; nothing was done.
                again = (httpx.codes.SERVICE_UNAVAILABLE, *((httpx.codes.BAD_GATEWAY,) if twice else ()))
                if answer.status_code not in again or not pause:
                    break
            time.sleep(pause)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise CheckpointError(f"{self._http.base_url}: refused. Set PREFECT_API_AUTH_STRING=user:password.")
        if answer.status_code in (httpx.codes.CONFLICT, httpx.codes.UNPROCESSABLE_ENTITY, httpx.codes.NOT_FOUND):
            raise RecipeError(f"{place}: {_detail(answer)}")
        if not answer.is_success:
            raise CheckpointError(f"{self._http.base_url}{place}: {answer.status_code} {_detail(answer)}")
        return answer.json()

    def _send(self, verb: str, place: str, body: Any) -> httpx.Response:
        """Once; with a new token, which is good for an hour, if the server wants one (CSRF protection)."""
        answer = self._http.request(verb, place, json=body)
        if answer.status_code == httpx.codes.FORBIDDEN:
            token = self._http.get("/csrf-token", params={"client": self._http.headers["Prefect-Csrf-Client"]})
            if token.is_success:
                self._http.headers["Prefect-Csrf-Token"] = token.json()["token"]
                answer = self._http.request(verb, place, json=body)
        return answer


def no_server() -> RecipeError:
    """What is said where no server is named."""
    return RecipeError("no server: set PREFECT_API_URL=http://host:4200/api, or start one with `tripoise serve`.")


def no_answer(url: str, error: httpx.TransportError) -> CheckpointError:
    """What is said where the server that is named does not answer."""
    return CheckpointError(f"{url}: no answer ({error}). Start the server, or correct PREFECT_API_URL.")


def _run(answer: Mapping[str, Any]) -> Run:
    state = answer.get("state") or {}
    return Run(answer["id"], answer["name"], answer.get("state_type") or "SCHEDULED", state.get("message") or "")


def _detail(answer: httpx.Response) -> str:
    try:
        told = answer.json()
        return str(told.get("detail") or told.get("exception_detail") or told)
    except ValueError:
        return answer.text[:300]
