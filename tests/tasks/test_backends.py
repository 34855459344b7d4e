"""Backends: an endpoint gives what the same model gives through transformers, and keeps its key to itself."""

import json
import logging
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from merging_core.errors import CheckpointError, RecipeError
from tasks.backends import Endpoint, load_endpoint
from tasks.evaluate import Execution, load_model
from tasks.harness import has_chat_template, transformers_model
from tests.tasks.completion_server import CompletionServer

KEY = "sk-0123456789abcdef"
PAIRS = [
    ("a b c", " d"),
    ("a b c", " d e f g"),
    ("", "a b"),
    ("l k j i h g f e d c b a", " a"),
    ("a b ", "c"),
    *((f"a {word}", f" {other}") for word in "abcd" for other in "efgh"),
]


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def folder(request, family):
    """A tiny random Llama whose tokenizer puts BOS in front, or does not."""
    path = family["base"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    if request.param:
        whole = {"Sequence": {"id": "A", "type_id": 0}}
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, whole],
            "pair": [bos, whole, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        path.write_text(json.dumps(tokenizer))
    return family["base"]


def endpoint(server, **settings):
    return Endpoint(**{"url": server.url, "model": "tiny", "revision": "1", "backoff_s": 0.01} | settings)


def served(folder, settings):
    return load_model(folder, Execution(), settings)


def likelihoods(lm, pairs=PAIRS):
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)])


def texts(lm, prompts, **how):
    return lm.generate_until([Instance("generate_until", {}, (text, how), place) for place, text in enumerate(prompts)])


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_endpoint_gives_the_likelihoods_of_the_same_model_through_transformers(folder, concurrency):
    expected = likelihoods(transformers_model(folder, "cpu", 4))
    with CompletionServer(folder) as server:
        found = likelihoods(served(folder, endpoint(server, concurrency=concurrency)))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(value, 6) for value, _ in found}) > 5
    assert 1 <= server.most_at_once <= concurrency


def test_an_endpoint_gives_the_rolling_likelihoods_of_the_same_model(folder):
    asked = [Instance("loglikelihood_rolling", {}, ("a b c d e",), 0)]
    expected = transformers_model(folder, "cpu", 1).loglikelihood_rolling(asked)
    with CompletionServer(folder) as server:
        found = served(folder, endpoint(server)).loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_endpoint_gives_the_texts_of_the_same_model_through_transformers(folder):
    how = {"do_sample": False, "max_gen_toks": 8}
    prompts = ["a b c", "l", "<s> a", "a b c", *"defgh"]
    lm = transformers_model(folder, "cpu", 4)
    free = texts(lm, prompts, until=[], **how)
    # A word that really ends some of them early.
    stop = free[0].split()[2]
    expected = texts(lm, prompts, until=[stop], **how)
    assert expected != free
    with CompletionServer(folder) as server:
        asked = served(folder, endpoint(server))
        assert texts(asked, prompts, until=[], **how) == free
        assert texts(asked, prompts, until=[stop], **how) == expected
    assert asked.tok_encode("<s> a") == lm.tok_encode("<s> a") == [1, 4]


def test_a_key_that_a_server_writes_into_a_completion_is_not_kept(folder, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with CompletionServer(folder, lambda *_: (200, json.dumps({"choices": [{"text": f"a {KEY} b"}]}))) as server:
        lm = served(folder, endpoint(server, key_variable="TEST_KEY"))
        assert texts(lm, ["a"], until=[], do_sample=False, max_gen_toks=4) == ["a *** b"]


def test_a_server_that_ignores_stop_sequences_gives_the_same_texts(folder):
    class Deaf(CompletionServer):
        def complete(self, prompt, body):
            return super().complete(prompt, {**body, "stop": []})

    how = {"do_sample": False, "max_gen_toks": 8, "until": ["c", "d", "e"]}
    with CompletionServer(folder) as plain, Deaf(folder) as deaf:
        found = [texts(served(folder, endpoint(one)), ["a", "b"], **how) for one in (plain, deaf)]
    assert found[0] == found[1]


def test_sampled_responses_to_one_prompt_differ_and_repeat(folder):
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    with CompletionServer(folder) as server:
        lm = served(folder, endpoint(server))
        once, again = (texts(lm, ["a b"] * 4 + ["c d"], **how) for _ in range(2))
    assert once == again
    assert len(set(once[:4])) == 4


def test_requests_run_at_the_same_time(folder):
    both = threading.Barrier(2)

    def wait(body, attempt):
        both.wait(timeout=30)

    with CompletionServer(folder, wait) as server:
        likelihoods(served(folder, endpoint(server, concurrency=2)), PAIRS[:2])
    assert server.most_at_once == 2


def test_a_busy_or_broken_server_is_asked_again(folder):
    def stumble(body, attempt):
        return [(503, "busy"), (429, "slow down"), None][attempt]

    with CompletionServer(folder) as steady, CompletionServer(folder, stumble) as server:
        expected = likelihoods(served(folder, endpoint(steady)), PAIRS[:3])
        assert likelihoods(served(folder, endpoint(server)), PAIRS[:3]) == expected
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("status", "text", "error", "message"),
    [
        (401, f"no such key {KEY}", RecipeError, r"refuses the request \(HTTP 401: no such key \*\*\*\)"),
        (404, "no model", RecipeError, "Check url, model"),
        (500, f"lost {KEY}", CheckpointError, r"failed 2 times, last: HTTP 500: lost \*\*\*"),
        (200, "<html>", CheckpointError, "not a JSON object"),
        (200, '{"choices": [{"text": "a"}]}', CheckpointError, "gives log-probabilities of none"),
    ],
)
def test_what_an_endpoint_says_in_place_of_an_answer_is_told_without_the_key(
    folder, monkeypatch, caplog, status, text, error, message
):
    monkeypatch.setenv("TEST_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with CompletionServer(folder, lambda body, attempt: (status, text)) as server:
        lm = served(folder, endpoint(server, key_variable="TEST_KEY", retries=1))
        with pytest.raises(error, match=message) as caught:
            likelihoods(lm, PAIRS[:2])
    assert server.headers[0][0] == "/v1/completions"
    assert server.headers[0][1]["Authorization"] == f"Bearer {KEY}"
    assert "\n" not in str(caught.value)
    told = caught.value
    while told is not None:
        assert KEY not in repr(told)
        told = told.__context__
    assert not [record for record in caplog.records if KEY in record.getMessage()]


@pytest.mark.parametrize("change", [lambda tokens: [1, *tokens], lambda tokens: tokens[1:]])
def test_a_server_that_echoes_other_tokens_than_it_got_is_refused(folder, change):
    class Other(CompletionServer):
        def complete(self, prompt, body):
            return super().complete(change(prompt), body)

    with Other(folder) as server, pytest.raises(CheckpointError, match=r"was sent 4 tokens|was sent 5 tokens"):
        likelihoods(served(folder, endpoint(server)), PAIRS[:1])


def test_no_key_is_sent_unless_one_is_named(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with CompletionServer(folder) as server:
        likelihoods(served(folder, endpoint(server)), PAIRS[:2])
    assert KEY not in repr(server.headers)


def test_a_server_out_of_reach_is_named(folder):
    with CompletionServer(folder) as server:
        pass
    lm = served(folder, endpoint(server, retries=1))
    with pytest.raises(CheckpointError, match=r"endpoint http://127.*failed 2 times, last: Connect"):
        likelihoods(lm, PAIRS[:1])


def test_the_identity_tells_endpoints_apart_and_holds_no_key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    given = {"url": "http://host/v1", "model": "m", "revision": "1"}
    plain = Endpoint(**given).identity()
    assert KEY not in repr(plain)
    for changed in ({"url": "http://other/v1"}, {"model": "n"}, {"revision": "2"}, {"max_length": 64}):
        assert Endpoint(**given | changed).identity() != plain
    for same in ({"key_variable": "TEST_KEY"}, {"concurrency": 1}, {"retries": 0}, {"url": "http://host/v1/"}):
        assert Endpoint(**given | same).identity() == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://user:secret@host/v1"}, "without user, password"),
        ({"url": "http://host/v1?key=secret"}, "without user, password"),
        ({"url": "host/v1"}, "url must be"),
        ({"model": ""}, "model must not be empty"),
        ({"revision": " "}, "revision must not be empty"),
        ({"key_variable": "sk-secret"}, "name of an environment variable"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"max_length": 1}, "max_length must be"),
    ],
)
def test_a_wrong_endpoint_is_refused_without_showing_a_secret(settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Endpoint(**{"url": "http://host/v1", "model": "m", "revision": "1"} | settings)
    assert "secret" not in str(caught.value)


def test_the_endpoint_file_of_the_docs_is_valid(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
    (tmp_path / "endpoint.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    found = load_endpoint(tmp_path / "endpoint.yaml")
    assert (found.key_variable, found.revision, found.max_length) == ("MY_ENDPOINT_KEY", "2026-11-25", 4096)


def test_a_missing_key_is_named(folder, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    settings = Endpoint(url="http://127.0.0.1:9/v1", model="m", revision="1", key_variable="TEST_KEY")
    with pytest.raises(RecipeError, match="variable TEST_KEY is not set"):
        served(folder, settings)


def test_how_much_an_endpoint_reads_is_stated_or_read_from_the_config(folder):
    settings = {"url": "http://127.0.0.1:9/v1", "model": "m", "revision": "1"}
    # One token of its window is always made.
    assert served(folder, Endpoint(**settings)).max_length == 31
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Set max_length"):
        served(folder, Endpoint(**settings))
    lm = served(folder, Endpoint(**settings, max_length=16))
    assert (lm.max_length, has_chat_template(lm)) == (15, False)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_that_is_not_installed_is_refused_with_the_remedy(folder):
    with pytest.raises(RecipeError, match=r"needs the package vllm.*backend transformers"):
        load_model(folder, Execution(backend="vllm"))


def test_vllm_on_another_gpu_than_the_first_is_refused_with_the_remedy(folder):
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES"):
        load_model(folder, Execution(backend="vllm", device="cuda:1"))
