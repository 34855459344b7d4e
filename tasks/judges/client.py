"""What a chat-completions endpoint says to one request."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from tasks.http_api import ApiClient

_ABOUT_THIS_REQUEST: Final = frozenset({400, 413, 422})

log = logging.getLogger("tripoise.judges")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    text: str
    is_reply: bool
    """Whether it is the text of a chat completion; else it is the beginning of whatever came."""


def complete(client: ApiClient, body: Mapping[str, Any]) -> Answer:
    """What the model replied, or what came instead: a request that is too long or filtered out has no reply.

    Raises:
        RecipeError, CheckpointError, Stopped: see :meth:`tasks.http_api.ApiClient.post`.
    """
    response = client.post("chat/completions", body, _ABOUT_THIS_REQUEST)
    if response.is_success:
        with suppress(ValueError, KeyError, IndexError, TypeError):
            content = response.json()["choices"][0]["message"]["content"]
            if isinstance(content, str):
                return Answer(client.scrub(content), is_reply=True)
    log.warning("%s: HTTP %d is no reply; it counts as unparsed", client.subject, response.status_code)
    return Answer(client.shown(response.text), is_reply=False)
