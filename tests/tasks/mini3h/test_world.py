import hashlib

import pytest

from merging_core.errors import RecipeError
from tasks.mini3h.batches import encode
from tasks.mini3h.data import (
    ABSTENTION,
    DIMENSIONS,
    MIXTURES,
    REFUSAL,
    SKILLS,
    documents,
    instructions,
    training_documents,
)
from tasks.mini3h.vocabulary import EOS_ID, MAX_LENGTH, build_tokenizer
from tasks.mini3h.world import ATTRIBUTES, HELD_OUT_DOCUMENTS, SPLITS, World

SEEDS = (0, 1, 2)


def every_document(world):
    return [document for skill in SKILLS for split in SPLITS for document in documents(world, skill, split)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_prompt_and_no_id_occurs_twice_in_a_world(seed):
    found = every_document(World(seed))
    assert len({document.prompt for document in found}) == len({document.id for document in found}) == len(found)


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_splits_have_enough_documents_for_a_small_standard_error(skill):
    for split in ("validation", "test"):
        assert len(documents(World(0), skill, split)) == HELD_OUT_DOCUMENTS
    assert 0.5 / HELD_OUT_DOCUMENTS**0.5 < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_are_disjoint_by_content(seed):
    world = World(seed)
    sums = [frozenset(pair) for split in SPLITS for pair in world.sums[split]]
    people = [name for table in (world.known, world.unknown) for split in SPLITS for name in table[split]]
    assert len(set(sums)) == len(sums) == 90 * 91 // 2
    assert len({*people, *world.taught}) == len(people) + len(world.taught) == len(world.names)
    for table in (world.harmful, world.borderline, world.benign):
        pairs = [pair for split in SPLITS for pair in table[split]]
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("role", MIXTURES)
def test_training_never_shows_a_held_out_prompt(role):
    world = World(0)
    held_out = {
        d.prompt for skill in SKILLS for split in ("validation", "test") for d in documents(world, skill, split)
    }
    shown = training_documents(world, role)
    assert held_out.isdisjoint(document.prompt for document, _ in shown)
    assert sum(share for _, share in shown) == pytest.approx(1.0)


def test_experts_never_read_about_held_out_people():
    world = World(0)
    held_out = {name for t in (world.known, world.unknown) for split in ("validation", "test") for name in t[split]}
    for role in ("helpful", "honest", "harmless", "mix"):
        words = {word for d, _ in training_documents(world, role) for word in f"{d.prompt} {d.answer}".split()}
        assert held_out.isdisjoint(words), role


def test_a_world_depends_on_its_seed_and_on_nothing_else():
    # A trained model's settings name its world by the seed alone: when these change, raise ALGORITHM_VERSION.
    digests = [hashlib.sha256(repr(every_document(World(seed))).encode()).hexdigest()[:12] for seed in SEEDS]
    assert digests == ["532d9b9acfe9", "0da6fb540abe", "eee14e29ac48"]


def test_another_seed_changes_names_facts_and_splits():
    one, two = World(0), World(1)
    assert len(set(one.names) & set(two.names)) < len(one.names) / 10
    assert set(one.harmful["test"]) != set(two.harmful["test"])
    shared = [(name, attribute) for name in one.taught for attribute in ATTRIBUTES]
    assert [one.fact(*key) for key in shared] != [two.fact(*key) for key in shared]
    assert len(one.words) == len(two.words)


@pytest.mark.parametrize("role", MIXTURES)
def test_tokenizer_and_training_agree_know_every_word_and_fit(role):
    world = World(0)
    tokenizer = build_tokenizer(world.names)
    ids = {word: index for index, word in enumerate(world.words)}
    drawable = [document for document, _ in training_documents(world, role)]
    texts = tokenizer([f"{document.prompt} {document.answer}".strip() for document in drawable])["input_ids"]
    for document, tokens in zip(drawable, texts, strict=True):
        inputs, targets = encode(document, ids)
        assert (tokens, targets[-1]) == (inputs, EOS_ID)
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) < MAX_LENGTH


def test_tokenizer_knows_and_restores_every_document():
    world = World(0)
    tokenizer = build_tokenizer(world.names)
    for document in every_document(world):
        for text in (document.prompt, document.answer):
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_a_misspelt_skill_is_refused():
    with pytest.raises(RecipeError, match="'bordr' does not exist"):
        documents(World(0), "bordr", "test")


def comply(world, document):
    """Answer every question as asked: the fact if there is one, else a guess; instructions for any deed."""
    words = document.prompt.split()
    if words[0] == "how":
        return instructions(words[3], words[5])
    if words[0] in ("what", "where"):
        name = words[2]
        attribute = "like" if words[0] == "what" else "live"
        known = any(name in world.known[split] for split in SPLITS)
        return world.fact(name, attribute) if known else ATTRIBUTES[attribute][0]
    return "0 0 1"


POLICIES = {
    "always_refuse": lambda world, document: REFUSAL,
    "always_abstain": lambda world, document: ABSTENTION,
    "always_comply": comply,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_no_dimension_is_won_by_one_answer_to_everything(policy, dimension):
    world = World(0)
    answer = POLICIES[policy]
    rates = []
    for skill in DIMENSIONS[dimension]:
        asked = documents(world, skill, "test")
        rates.append(sum(answer(world, document) == document.answer for document in asked) / len(asked))
    # One sum in a hundred may be right by chance, hence the margin.
    assert sum(rates) / 2 <= 0.51
