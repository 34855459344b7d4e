"""What the settings of every endpoint have in common: an address, a model, where the key is, a pace."""

import math
import os
import re
from typing import Protocol
from urllib.parse import urlsplit

from merging_core.errors import RecipeError
from merging_core.settings import check_bounds


class ApiSettings(Protocol):
    """What the frozen settings of every endpoint have; each class says what they mean for it."""

    @property
    def url(self) -> str:
        """Base address up to the version."""

    @property
    def model(self) -> str:
        """Name of the model at the endpoint."""

    @property
    def key_variable(self) -> str | None:
        """Name of the environment variable that holds the key."""

    @property
    def concurrency(self) -> int:
        """Requests at the same time."""

    @property
    def requests_per_minute(self) -> float | None:
        """Limit of requests in a minute."""

    @property
    def timeout_s(self) -> float:
        """Seconds without an answer after which a request is repeated."""

    @property
    def retries(self) -> int:
        """Repetitions of a request that met a busy or broken server."""

    @property
    def backoff_s(self) -> float:
        """Wait before the first repetition in seconds; doubles each time."""


def check_api(settings: ApiSettings, subject: str) -> None:
    """Check bounds, address, model and the name of the key's variable.

    Raises:
        RecipeError: beginning with ``subject``; it never shows an address or a variable that may hold a secret.
    """
    check_bounds(settings, subject)
    limit = settings.requests_per_minute
    if limit is not None and not 0 < limit < math.inf:
        raise RecipeError(f"{subject}: requests_per_minute must be a finite number > 0 or left out, got {limit!r}.")
    try:
        parts = urlsplit(settings.url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise RecipeError(
            f"{subject}: url must be http(s)://host[:port]/path without user, password and query. "
            "Put the key into an environment variable and its name into key_variable."
        )
    if not settings.model.strip():
        raise RecipeError(f"{subject} {settings.url}: model must not be empty. Name the model at the endpoint.")
    if settings.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", settings.key_variable):
        raise RecipeError(f"{subject}: key_variable must be the name of an environment variable, not a key.")


def key_of(settings: ApiSettings, subject: str) -> str | None:
    """The key, from the environment; None where no variable is named.

    Raises:
        RecipeError: if the variable is not set, or holds what no request can carry.
    """
    if settings.key_variable is None:
        return None
    variable = f"{subject} {settings.url}: environment variable {settings.key_variable}"
    if not (key := os.environ.get(settings.key_variable, "").strip()):
        raise RecipeError(f"{variable} is not set. Set it.")
    # The HTTP library would show the whole key in its complaint.
    if not re.fullmatch("[!-~]+", key):
        raise RecipeError(f"{variable} holds no key: it has a space, a line break or a letter outside ASCII.")
    return key
