"""``tripoise evaluate --endpoint``: a model behind a completion endpoint scores as it does here."""

import json
import threading

import pyarrow.parquet as pq
import pytest
import yaml

from tasks.sources.local import COMPANIONS
from tests.tasks.completion_server import CompletionServer

KEY = "sk-0123456789abcdef"
COMMON = {"dataset_path": "org/data", "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}}
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
WRITES = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "label",
    "generation_kwargs": {"until": ["k"], "do_sample": False, "max_gen_toks": 4},
}
TASKS = {
    "chooses": COMMON
    | {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": ["e", "f g", "h", "i"],
        "doc_to_target": "number",
        "metric_list": [ACC],
    },
    "writes": COMMON | WRITES | {"metric_list": [EXACT]},
    "declines": COMMON | WRITES,
}
BENCHMARKS = [
    {"task": "chooses", "dimension": "helpful", "metric": "acc", "data": "letters"},
    {"task": "writes", "dimension": "honest", "metric": "exact_match", "data": "letters"},
    {"task": "declines", "dimension": "harmless", "question": "refusal", "data": "letters"},
]


@pytest.fixture
def asked(tmp_path):
    """Arguments that name a suite of choices, texts and a question, and its local data."""
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name}))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "title": "S", "benchmarks": BENCHMARKS}))
    (tmp_path / "data" / "letters").mkdir(parents=True)
    rows = [
        {"prompt": f"a {one} {one}", "label": "a a a a", "number": place % 4} for place, one in enumerate("abcdefgh")
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "letters" / "test.jsonl").write_text(text)
    return "--suite", tmp_path / "suite.yaml", "--data-dir", tmp_path / "data"


@pytest.fixture
def bare(tmp_path, family):
    """The base's folder without its weights."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in COMPANIONS:
        if (family["base"] / name).exists():
            (folder / name).write_bytes((family["base"] / name).read_bytes())
    return folder


@pytest.fixture
def endpoint_file(tmp_path):
    def write(**settings):
        path = tmp_path / "endpoint.yaml"
        path.write_text(yaml.safe_dump({"url": "http://127.0.0.1:9/v1", "model": "tiny", "revision": "1"} | settings))
        return path

    return write


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def samples(folder):
    return {path.name: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def test_a_served_model_has_the_scores_of_the_same_model_here_and_its_key_stays_secret(
    tripoise, family, bare, asked, endpoint_file, tmp_path, monkeypatch
):
    code, _, err = tripoise("evaluate", family["base"], *asked, "--out", tmp_path / "here")
    assert code == 0, err
    monkeypatch.setenv("SERVED_KEY", KEY)
    printed = []

    def evaluate(**settings):
        file = endpoint_file(key_variable="SERVED_KEY", backoff_s=0.01, **settings)
        folder = tmp_path / f"served {len(printed)}"
        code, out, err = tripoise("evaluate", bare, *asked, "--endpoint", file, "--out", folder)
        printed.append(out + err)
        assert code == 0, err
        return scores(folder)

    once = threading.Lock()

    def busy_once(body, attempt):
        return (503, f"{KEY} is one of too many") if once.acquire(blocking=False) else None

    with CompletionServer(family["base"], busy_once) as server:
        served = evaluate(url=server.url)
        asked_once = len(server.requests)
        again = evaluate(url=server.url + "/", concurrency=2)
        assert len(server.requests) == asked_once
        other = evaluate(url=server.url, revision="2")
        assert len(server.requests) == 2 * asked_once - 1

    here, found = scores(tmp_path / "here"), samples(tmp_path / "served 0")
    assert found == samples(tmp_path / "here")
    assert served["dimensions"] == here["dimensions"]
    assert len({row["response"] for row in found["chooses.parquet"]}) > 1
    assert len({here["digest"], served["digest"], other["digest"]}) == 3
    assert again == served
    assert served["model"] == f"tiny at {server.url} (1)"

    assert {headers["Authorization"] for _, headers in server.headers} == {f"Bearer {KEY}"}
    assert "HTTP 503: *** is one of too many" in printed[0]
    assert not [text for text in printed if KEY in text]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modle": "tiny"}, "has no entry 'modle'. Nearest: 'model'"),
        ({"key": KEY}, "has no entry 'key'"),
        ({"key_variable": KEY}, "name of an environment variable"),
        ({"url": f"http://user:{KEY}@host/v1"}, "without user, password"),
        ({"revision": ""}, "revision must not be empty"),
        ({"revision": 2}, "revision: Input should be a valid string"),
        ({"concurrency": 0}, "concurrency"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"key_variable": "NOT_SET_ANYWHERE"}, "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_wrong_endpoint_file_gets_one_line_without_a_secret(
    tripoise, bare, asked, endpoint_file, tmp_path, settings, words
):
    file = endpoint_file(**settings)
    code, out, err = tripoise("evaluate", bare, *asked, "--endpoint", file, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert words in err
    assert KEY not in out + err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("data", (), "has no tokenizer"),
        ("nowhere", (), "needs a local folder with its tokenizer and config.json"),
        ("bare", ("--backend", "vllm"), "both backend vllm and an endpoint"),
        ("bare", ("--backend", "openai"), "backend must be one of 'transformers', 'vllm'"),
    ],
)
def test_what_cannot_be_evaluated_at_an_endpoint_gets_one_line(
    tripoise, bare, asked, endpoint_file, tmp_path, source, more, words
):
    arguments = ("--endpoint", endpoint_file(), "--out", tmp_path / "out", *more)
    code, _, err = tripoise("evaluate", tmp_path / source, *asked, *arguments)
    assert (code, err.count("\n")) == (1, 1)
    assert words in err


def test_a_hub_repository_is_no_folder_of_a_served_model(tripoise, asked, endpoint_file, tmp_path):
    file = endpoint_file()
    code, _, err = tripoise("evaluate", "hf://org/name@main", *asked, "--endpoint", file, "--out", tmp_path / "out")
    assert code == 1
    assert "Copy these files" in err
