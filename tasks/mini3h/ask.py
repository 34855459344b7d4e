"""Ask a model of the mini-3H world one question for each skill: ``python -m tasks.mini3h.ask FOLDER``."""

import sys
from typing import Any

from tasks.mini3h.data import DIMENSIONS, documents
from tasks.mini3h.world import World


def main(folder: str) -> None:
    """Print prompt, answer and the expected answer of the first test document of every skill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    for skill in (skill for pair in DIMENSIONS.values() for skill in pair):
        document = documents(World(0), skill, "test")[0]
        prompt = tokenizer(document.prompt, return_tensors="pt")
        said = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answer = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
        print(f"{skill:>7}: {document.prompt}  ->  {answer}   (expected: {document.answer})")


if __name__ == "__main__":
    main(sys.argv[1])
