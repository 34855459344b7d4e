"""Real benchmark files asked of a real, tiny and untrained Llama: batches, padding, artifacts, and what is recorded."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tasks.evaluate
from merging_core.errors import RecipeError
from tasks.evaluate import (
    EvaluateSettings,
    Execution,
    evaluate_steps,
    load_model,
    run_benchmark,
    run_generation,
)
from tasks.generations import read_generations
from tasks.scores import read_record, read_values
from tasks.sources import resolve
from tasks.steps import Direct
from tasks.store import Store
from tasks.suite import load_suite
from tests.tasks.tiny_models import tiny_llama

DATA = Path(__file__).parents[2] / "../shared/data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real files lie in ../shared/data, which is absent")
TEMPLATE = "{% for turn in messages %}<|{{turn['role']}}|>{{turn['content']}}{% endfor %}<|assistant|>"


def write_byte_llama(folder, chat_template=None, max_position=4096):
    """One token a byte, so that prompts of different lengths need padding; the weights are drawn, not trained."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_llama(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_key_value_heads=1,
            max_position_embeddings=max_position,
            # Far from flat, so that greedy answers and likelihoods depend on the prompt.
            initializer_range=0.4,
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_byte_llama(tmp_path_factory.mktemp("models") / "model", TEMPLATE)


@pytest.fixture(scope="module")
def suite():
    """Three benchmarks of 3h-full that are read by likelihood, by exact match and by a judge; short responses."""
    full = load_suite("3h-full", DATA)
    tasks_ = ("truthfulqa_mc1", "truthfulqa_mc2", "xstest_safe")
    return replace(full, benchmarks=tuple(full.benchmark(task) for task in tasks_))


@pytest.fixture(scope="module")
def answers(folder, suite):
    """What one prompt at a time gives."""
    lm = load_model(folder, Execution(batch_size=1))
    return {one.task: asked_of(lm, suite, one) for one in suite.benchmarks}


def asked_of(lm, suite, benchmark):
    settings = EvaluateSettings(limit=7)
    if benchmark.question:
        return {one.id: one.responses for one in run_generation(lm, suite, benchmark, settings)[0]}
    samples = run_benchmark(lm, suite, benchmark, settings).samples
    return {one.id: (one.response, pytest.approx(one.value, abs=1e-4)) for one in samples}


@pytest.mark.parametrize("batch_size", [3, 16])
def test_answers_do_not_move_with_the_batch_size(folder, suite, answers, batch_size):
    lm = load_model(folder, Execution(batch_size=batch_size))
    for benchmark in suite.benchmarks:
        found = asked_of(lm, suite, benchmark)
        assert found == answers[benchmark.task]
        assert len(set(map(str, found.values()))) > 1


def test_greedy_responses_are_those_of_plain_transformers(folder, suite, answers):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found, _ = run_generation(
        load_model(folder, Execution(batch_size=16)), suite, suite.benchmark("xstest_safe"), EvaluateSettings(limit=2)
    )
    for one in found:
        tokens = tokenizer(one.prompt, return_tensors="pt")
        said = model.generate(**tokens, max_new_tokens=256, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert one.responses == (tokenizer.decode(said, skip_special_tokens=True),)
        assert one.prompt.startswith("<|user|>")


def test_likelihoods_are_those_of_plain_transformers(folder, suite):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = json.loads((DATA / "truthfulqa/mc_task.json").read_text())
    lm = load_model(folder, Execution(batch_size=16))
    result = run_benchmark(lm, suite, suite.benchmark("truthfulqa_mc2"), EvaluateSettings(limit=2))
    for sample in result.samples:
        targets = rows[int(sample.id.split("-")[0])]["mc2_targets"]
        start = len(tokenizer(sample.prompt)["input_ids"])
        chances = []
        for choice in targets:
            tokens = torch.tensor([tokenizer(f"{sample.prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = model(tokens).logits[0].log_softmax(-1)
            read = logits[start - 1 : -1].gather(1, tokens[0, start:, None])
            chances.append(math.exp(read.sum().item()))
        true = sum(chance for chance, label in zip(chances, targets.values(), strict=True) if label)
        assert sample.value == pytest.approx(true / sum(chances), abs=1e-3)


def test_sampled_responses_do_not_move_with_the_batch_size(folder, suite):
    benchmark = replace(suite.benchmark("xstest_safe"), samples=3, temperature=1.0)
    runs = []
    for batch_size in (1, 16):
        lm = load_model(folder, Execution(batch_size=batch_size))
        before = torch.random.get_rng_state()
        found, _ = run_generation(lm, suite, benchmark, EvaluateSettings(limit=3))
        assert torch.equal(before, torch.random.get_rng_state())
        runs.append([one.responses for one in found])
    assert runs[0] == runs[1]
    assert all(len(set(responses)) == 3 for responses in runs[0])


def evaluated(store, model, suite, **settings):
    run = Direct(store)
    steps = evaluate_steps(model, "model", suite, EvaluateSettings(**settings), store, Execution())
    refs = run.build("evaluate", "evaluate", steps)
    return refs, [built.reused for built in run.built]


def test_one_load_serves_all_missing_benchmarks_and_a_new_one_asks_only_itself(folder, suite, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    model = resolve(str(folder), store).ref
    loads = []
    monkeypatch.setattr(tasks.evaluate, "load_model", lambda *args: loads.append(args) or load_model(*args))
    fewer = replace(suite, benchmarks=suite.benchmarks[1:])
    refs, reused = evaluated(store, model, fewer, limit=2)
    assert (len(loads), reused) == (1, [False, False])
    assert [ref.kind for ref in refs] == ["scores", "generations"]
    again, reused = evaluated(store, model, suite, limit=2)
    assert (len(loads), reused) == (2, [False, True, True])
    assert again[1:] == refs
    evaluated(store, model, suite, limit=2)
    assert len(loads) == 2


def test_generations_keep_what_was_said_and_how_it_was_asked(folder, suite, tmp_path):
    store = Store(tmp_path / "store")
    model = resolve(str(folder), store).ref
    only = replace(suite, benchmarks=(suite.benchmark("xstest_safe"), suite.benchmark("truthfulqa_mc1")))
    [generations, scores], _ = evaluated(store, model, only, limit=2)
    found, asked = read_generations(generations, store)
    assert [one.document["label"] for one in found] == ["safe", "safe"]
    assert (asked.bos, asked.chat_template, asked.has_chat_template, asked.partial) == ("yes", True, True, True)
    assert (asked.held_out, asked.cut, asked.num_fewshot) == (0.2, 0, 0)
    assert store.manifest(generations).details["question"] == "refusal"
    record = read_record(scores, store)
    assert (record["bos"], record["chat_template"], record["has_chat_template"]) == ("yes", False, True)
    assert set(read_values([scores], store)["truthfulqa_mc1"].values()) <= {0.0, 1.0}


def test_a_judge_or_a_weight_is_not_part_of_what_was_said(folder, suite, tmp_path):
    store = Store(tmp_path / "store")
    model = resolve(str(folder), store).ref
    one = suite.benchmark("xstest_safe")
    refs = [
        evaluated(store, model, replace(suite, benchmarks=(changed,)), limit=1)[0]
        for changed in (one, replace(one, question="harm", weight=2.0))
    ]
    assert refs[0] == refs[1]
    changed = replace(suite, benchmarks=(replace(one, limit=1),))
    assert evaluated(store, model, changed, limit=5)[0] == refs[0]


def test_prompts_that_the_model_cannot_read_whole_are_counted(tmp_path, suite):
    short = write_byte_llama(tmp_path / "short", max_position=768)
    result = run_benchmark(
        load_model(short, Execution()), suite, suite.benchmark("truthfulqa_mc1"), EvaluateSettings(limit=20)
    )
    longest = {sample.id: len(sample.prompt.encode()) for sample in result.samples}
    # The six examples of TruthfulQA's prompt alone fill most of 768 bytes.
    assert 0 < result.asked.cut <= 20
    assert result.asked.cut >= sum(length > 768 for length in longest.values())


def test_a_response_that_leaves_no_room_for_the_prompt_is_refused(tmp_path, suite):
    short = write_byte_llama(tmp_path / "short", max_position=128)
    lm = load_model(short, Execution())
    with pytest.raises(RecipeError, match="xstest_safe: asks for up to 256 tokens, and the model reads 128"):
        run_generation(lm, suite, suite.benchmark("xstest_safe"), EvaluateSettings(limit=1))


@pytest.mark.parametrize("task", ["gsm8k_cot", "halueval_wild", "humaneval", "xstest_unsafe", "truthfulqa_mc2"])
def test_a_real_file_is_asked_of_a_real_model(tmp_path, task):
    suite = load_suite("3h-full", DATA)
    one = suite.benchmark(task)
    roomy = write_byte_llama(tmp_path / "roomy", max_position=8192)
    lm = load_model(roomy, Execution(batch_size=2))
    if one.question:
        found, asked = run_generation(lm, suite, one, EvaluateSettings(limit=2))
        assert all(one.responses[0] for one in found)
    else:
        scored = run_benchmark(lm, suite, one, EvaluateSettings(limit=2))
        found, asked = scored.samples, scored.asked
    assert (len(found), asked.cut, asked.bos, asked.has_chat_template) == (2, 0, "yes", False)
