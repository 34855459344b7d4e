"""What both users of the HTTP client rely on, beside what their own tests show: no part of a key is ever told."""

import logging
import threading

import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks.backends import Endpoint
from tasks.http_api import ApiClient
from tests.tasks.loopback import Loopback

KEY = "sk-0123456789abcdef"


class Says(Loopback):
    """Answers as a function of the request's body and of how often it came before."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def respond(self, body, before):
        return self.answer(body, before)


def client(server, **settings):
    settings = {"url": server.url, "model": "m", "revision": "1", "backoff_s": 0.001} | settings
    return ApiClient(Endpoint(**settings), "endpoint", refused="Check it.", failed="Run again.")


def post(client, number):
    return client.post("completions", {"number": number}).text


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", "sk 0123456789", "sk-012345678\u00e9"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with Says(lambda body, before: (200, {}, "")) as server:
        with pytest.raises(RecipeError, match="TEST_KEY holds no key") as caught:
            client(server, key_variable="TEST_KEY")
    assert key[:5] not in str(caught.value)


def test_a_key_where_the_shown_text_ends_leaves_no_part_of_it(monkeypatch, caplog):
    monkeypatch.setenv("TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with Says(lambda body, before: (503, {}, "x" * 295 + KEY)) as server:
        with pytest.raises(CheckpointError, match=r"HTTP 503: x{295}\*\*\*\. Run again") as caught:
            post(client(server, key_variable="TEST_KEY", retries=1), 0)
    assert KEY[:5] not in str(caught.value) + caplog.text


def test_answers_come_in_the_order_of_the_items_whatever_order_they_are_ready_in():
    last = threading.Event()

    def answer(body, before):
        if body["number"] == 2:
            last.set()
        assert last.wait(30)
        return 200, {}, str(body["number"])

    seen = []
    with Says(answer) as server, client(server, concurrency=3) as asked:
        found = asked.each(lambda number: post(asked, number), [0, 1, 2, 3], lambda *done: seen.append(done))
    assert found == ["0", "1", "2", "3"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_after_a_refusal_no_other_request_starts_and_waiting_ones_are_given_up():
    both = threading.Barrier(2)

    def answer(body, before):
        both.wait(30)
        return (503, {"Retry-After": "600"}, "busy") if body["number"] == 0 else (401, {}, "who are you?")

    with Says(answer) as server, client(server, concurrency=2) as asked:
        with pytest.raises(RecipeError, match="who are you"):
            asked.each(lambda number: post(asked, number), range(50))
    # The first would wait for ten minutes if the second did not wake it.
    assert len(server.requests) == 2


def test_an_answer_that_cannot_be_decoded_is_asked_for_again():
    def answer(body, before):
        return (200, {"Content-Encoding": "gzip"}, "no gzip") if before == 0 else (200, {}, "fine")

    with Says(answer) as server, client(server) as asked:
        assert post(asked, 0) == "fine"
