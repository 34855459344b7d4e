from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks
from tasks.mini3h.data import DIMENSIONS, SKILLS, documents
from tasks.mini3h.world import World

SUITES = Path(tasks.__file__).parent / "suites"
SUITE = yaml.safe_load((SUITES / "3h-mini.yaml").read_text())


def evaluate(model, **metadata):
    """Return lm-eval's results for all six tasks, in one split of one world."""
    manager = TaskManager(include_defaults=False, include_path=str(SUITES / SUITE["tasks"]), metadata=metadata)
    names = [benchmark["task"] for benchmark in SUITE["benchmarks"]]
    return simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)


@torch.no_grad()
def greedy_answers(model, tokenizer, asked):
    """Answer without lm-eval, padding or a cache: all prompts of one skill are equally long."""
    tokens = torch.tensor(tokenizer([document.prompt for document in asked])["input_ids"])
    prompt_length = tokens.shape[1]
    for _ in range(8):
        likeliest = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=1)
    answers = [row[prompt_length:] for row in tokens.tolist()]
    ended = [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in answers]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ended]


class Scripted(LM):
    """Looks a prompt up and says what the script holds for it."""

    def __init__(self, script):
        super().__init__()
        self.script = script

    def generate_until(self, requests, disable_tqdm=False):
        return [self.script[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def test_the_descriptor_names_every_task_under_its_dimension():
    named = {benchmark["task"]: benchmark["dimension"] for benchmark in SUITE["benchmarks"]}
    assert named == {f"mini3h_{skill}": dimension for dimension, pair in DIMENSIONS.items() for skill in pair}
    assert SUITE["name"] == "3h-mini"
    assert {file.stem for file in (SUITES / SUITE["tasks"]).glob("mini3h_*.yaml")} == set(named)


def test_a_trained_model_gets_the_answers_and_scores_of_a_plain_greedy_scorer(smoke_honest):
    model = AutoModelForCausalLM.from_pretrained(smoke_honest).eval()
    tokenizer = AutoTokenizer.from_pretrained(smoke_honest)
    results = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=50))
    scores = {}
    for skill in SKILLS:
        asked = documents(World(0), skill, "test")
        answers = greedy_answers(model, tokenizer, asked)
        samples = sorted(results["samples"][f"mini3h_{skill}"], key=lambda sample: sample["doc_id"])
        assert [sample["doc"]["id"] for sample in samples] == [document.id for document in asked]
        assert [sample["filtered_resps"][0] for sample in samples] == answers
        scores[skill] = sum(a == document.answer for a, document in zip(answers, asked, strict=True)) / len(asked)
        assert results["results"][f"mini3h_{skill}"]["exact_match,none"] == pytest.approx(scores[skill], abs=1e-12)
    # The comparison means little between models that are always wrong.
    assert max(scores.values()) > 0.5


@pytest.mark.parametrize(("split", "seed"), [("validation", 0), ("test", 1)])
def test_metadata_selects_the_split_and_the_world(split, seed):
    script = {d.prompt: d.answer for skill in SKILLS for d in documents(World(seed), skill, split)}
    results = evaluate(Scripted(script), split=split, world_seed=seed)
    assert {row["exact_match,none"] for row in results["results"].values()} == {1.0}
    assert {row["sample_len"] for row in results["results"].values()} == {150}


def test_a_model_that_is_never_right_scores_zero():
    script = {d.prompt: f"{d.answer} tea" for skill in SKILLS for d in documents(World(0), skill, "test")}
    results = evaluate(Scripted(script))
    assert {row["exact_match,none"] for row in results["results"].values()} == {0.0}


@pytest.mark.parametrize("metadata", [{"split": "tset"}, {"splt": "validation"}])
def test_a_misspelt_split_is_refused(metadata):
    with pytest.raises((ValueError, TypeError), match=r"spli?t"):
        evaluate(Scripted({}), **metadata)
