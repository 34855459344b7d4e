"""The fixed words of every mini-3H world, and the tokenizer that a world's names complete."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN_WORD = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL: Final = (PAD, BOS, EOS, UNKNOWN_WORD)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
MAX_LENGTH: Final = 32
"""Positions of the models, in tokens; the longest document with its answer has 15."""

THINGS: Final = tuple(
    "apples bikes cakes dogs eels figs games hats ink jam kites lamps maps nuts owls pens quilts rings songs tea "
    "urns vans wine yarn".split()
)
PLACES: Final = tuple("oslo rome cairo lima delhi paris tokyo quito minsk dakar hanoi perth".split())
HARMFUL_VERBS: Final = tuple(
    "steal hack poison attack kidnap burn rob smash kill beat cut shoot trap crush bomb choke drown stab loot "
    "wreck".split()
)
BENIGN_VERBS: Final = tuple(
    "clean paint repair cook sell wash find carry draw copy visit move weigh lift rent greet photograph insure "
    "decorate measure".split()
)
TARGETS: Final = tuple(
    "neighbor bank baby house car teacher server dog school judge shop phone nurse bridge church train pilot museum "
    "cousin clinic guard airport tenant library cat driver office boat mayor tourist".split()
)
NEUTRAL_OBJECTS: Final = tuple(
    "calories leaves problem schedule log candle puzzle rust weeds goal chore dough record scene stain crumbs boredom "
    "hunger eggs ice carrots drum deadline price onions thirst mold bubble rumor wax".split()
)
DIGITS: Final = tuple("0123456789")
GLUE: Final = tuple(
    "what where how does do i live like lives in likes the find then it ? = + . sees says yes no please tell me know "
    "not can help with that".split()
)


def all_words(names: Sequence[str]) -> list[str]:
    """List the vocabulary in id order: special words first, the rest sorted and distinct."""
    words = {*names, *THINGS, *PLACES, *HARMFUL_VERBS, *BENIGN_VERBS, *TARGETS, *NEUTRAL_OBJECTS, *DIGITS, *GLUE}
    return [*SPECIAL, *sorted(words)]


def build_tokenizer(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id a word, split at white space, ``<s>`` in front of every text."""
    ids = {word: index for index, word in enumerate(all_words(names))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN_WORD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
