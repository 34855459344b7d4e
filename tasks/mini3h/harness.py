"""The documents of a world as lm-eval reads them; ``tasks/suites/3h_mini/*.yaml`` name this function."""

from dataclasses import asdict

from datasets import Dataset

from tasks.mini3h.data import Skill, documents
from tasks.mini3h.world import Split, World


def dataset(
    *, skill: Skill, split: Split = "test", world_seed: int = 0, version: float, config_source: str
) -> dict[str, Dataset]:
    """Build one skill's documents in memory; no file, no cache, no network.

    lm-eval calls this with a task's ``dataset_kwargs`` (the skill) and ``metadata``, to which
    ``TaskManager(metadata={"split": "validation", "world_seed": 1})`` adds. Anything else in
    there is refused, so that a misspelt key cannot silently select the test split.

    Args:
        skill: from the task's YAML.
        split: which split lm-eval shall score, whatever lm-eval itself calls it.
        world_seed: seed of the world that the model was trained in.
        version: of the task, from its YAML; not used.
        config_source: added by lm-eval; not used.

    Returns:
        The key "test", which every task's ``test_split`` names, with rows of id, prompt, answer.
    """
    return {"test": Dataset.from_list([asdict(document) for document in documents(World(world_seed), skill, split)])}
