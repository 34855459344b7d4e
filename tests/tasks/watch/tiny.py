"""A suite of 40 questions for each H, and models of which it is known by hand what they answer.

A question ends in a letter, and its right answer is ``a``. A model says ``a`` after the letters it knows and ``b``
after the others: of helpful it is asked after e (30 times), f (9) and g (once), of honest after h, i and j, of harmless
after k (30) and l (10).
"""

import json
from pathlib import Path

import yaml

from tests.conftest import VOCABULARY, write_llama

ASKED = {
    "helpful": {"e": 30, "f": 9, "g": 1},
    "honest": {"h": 30, "i": 9, "j": 1},
    "harmless": {"k": 30, "l": 10},
}
ALL = "efghijkl"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [a, b]
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_suite(folder, questions=40):
    """Write the suite, or the first questions of it; gives its file."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    for name, letters in ASKED.items():
        ends = [letter for letter, number in letters.items() for _ in range(number)]
        words = [f"{'abcdefgh'[i % 8]} {'abcdefgh'[i // 8]} {letter}" for i, letter in enumerate(ends)][-questions:]
        lines = [json.dumps({"text": text, "gold": 0}) for text in words]
        (tasks / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, folder=tasks))
    benchmarks = [{"task": name, "dimension": name, "metric": "acc"} for name in ASKED]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "title": "tiny", "tasks": "tasks", "benchmarks": benchmarks}))
    return path


def write_model(folder, knows=ALL, seed=0):
    """Write a model that knows some letters; other seeds answer alike and have other content."""
    import torch

    def change(tensors):
        hidden = len(ALL)
        for name in tensors:
            if "o_proj" in name or "down_proj" in name:
                tensors[name].zero_()
            elif "norm" in name:
                tensors[name].fill_(1.0)
        embeddings, head = torch.zeros(len(VOCABULARY), hidden), torch.zeros(len(VOCABULARY), hidden)
        for place, letter in enumerate(ALL):
            embeddings[VOCABULARY[letter], place] = 1.0
            head[VOCABULARY["a" if letter in knows else "b"], place] = 1.0
        return tensors | {"model.embed_tokens.weight": embeddings, "lm_head.weight": head}

    write_llama(folder, seed, change=change)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    return folder


def share(dimension, knows):
    """What a model that knows some letters gets right of an H."""
    return sum(number for letter, number in ASKED[dimension].items() if letter in knows) / 40


def without(letters):
    """All letters but some."""
    return "".join(letter for letter in ALL if letter not in letters)


def watch_file(folder, sources, **more):
    """Write a watch on the suite that lies in ``folder / "suite"``; nothing needs to settle."""
    path = Path(folder) / "nightly.yaml"
    plain = {"suite": str(Path(folder) / "suite" / "suite.yaml"), "settle_s": 0, "sources": sources}
    path.write_text(yaml.safe_dump(plain | more, sort_keys=False))
    return path
